"""Which run the others are compared with: a plain run that differs from them in the selection of
tokens, not in the data it read.
"""

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from megatron_slm.analysis.run_folder import Run
from megatron_slm.config.architecture import ARCHITECTURE

SHARED_DATA = (
    "data.tokenizer",
    "data.document_policy",
    "data.sequence_length",
    "data.global_batch_size",
)
"""Settings in which a run and its baseline agree, beside the corpora, the initial weights and the
model."""


@dataclass(frozen=True)
class Baseline:
    """The baseline of a report. `run` is None when there is none; `sentence` says which it is and
    why, or why there is none; it is empty for a single run.
    """

    run: Run | None
    measured: tuple[Run, ...]
    """The runs that are measured against it, itself among them."""
    sentence: str

    def measures(self, run: Run) -> bool:
        return any(run is each for each in self.measured)


def find_baseline(runs: Sequence[Run], corpus: str | None = None) -> Baseline:
    """The first plain run that shares data, start and model with a run that selects; failing that,
    with another plain run.

    One that came to its end goes before one that did not.
    corpus: name of the validation corpus whose losses are compared; it must be the same files in
    both runs.
    """
    plain = [run for run in runs if run.is_plain]
    plain.sort(key=lambda run: not run.state.is_finished)
    for want_selecting in (True, False):
        for candidate in plain:
            like_it = [run for run in runs if not run_differences(run, candidate, corpus)]
            if any(run is not candidate and run.is_plain != want_selecting for run in like_it):
                return Baseline(candidate, tuple(like_it), _why(candidate, like_it, runs, corpus))
    return Baseline(None, (), _why_none(runs, plain, corpus))


def run_differences(run: Run, baseline: Run, corpus: str | None = None) -> list[str]:
    """What forbids measuring `run` against `baseline`, as phrases; none for a run and itself.

    Runs compare where they read the same tokens, in steps of the same size, into the same model
    with the same initial weights. A setting that one of them does not have (an older config.yaml)
    is no difference; training data that are not known are one.
    """
    if run is baseline:
        return []
    of_run, of_baseline = _conditions(run, corpus), _conditions(baseline, corpus)
    unknown = [
        candidate.name for candidate in (run, baseline) if not candidate.setting("data.train")
    ]
    if unknown:
        return [f"the config.yaml of {' and '.join(unknown)} names no data.train"]
    return [
        f"{name} is {_shown(run, name)} in {run.name} and {_shown(baseline, name)} in "
        f"{baseline.name}"
        for name in of_run
        if name in of_baseline and of_run[name] != of_baseline[name]
    ]


def _conditions(run: Run, corpus: str | None) -> dict[str, Any]:
    """Setting -> what is compared of it: paths made absolute, corpora with their weights whatever
    their order.
    """
    corpora = [os.path.abspath(str(prefix)) for prefix in run.setting("data.train") or []]
    weights = run.setting("data.weights") or []
    shares = [round(weight / sum(weights), 9) for weight in weights]  # any scale means the same
    start = run.setting("checkpoint.initialize_from")
    compared = {name: run.setting(name) for name in SHARED_DATA}
    compared |= {
        f"model.{name}": value
        for name, value in (run.setting("model") or {}).items()
        if name in ARCHITECTURE
    }
    if start is not None:
        compared["checkpoint.initialize_from"] = (
            os.path.abspath(start) if start else "random weights"
        )
    if compared["data.tokenizer"] is not None:
        compared["data.tokenizer"] = os.path.abspath(compared["data.tokenizer"])
    validation = [
        os.path.abspath(str(entry["corpus"]))
        for entry in run.setting("data.validation") or []
        if isinstance(entry, Mapping) and entry.get("name") == corpus and entry.get("corpus")
    ]
    if validation:
        compared["data.validation"] = validation
    # A configuration that another version wrote may hold fewer weights than corpora.
    blend = sorted(zip(corpora, shares, strict=False))
    return {"data.train": sorted(corpora), "data.weights": blend} | {
        name: value for name, value in compared.items() if value is not None
    }


def _shown(run: Run, name: str) -> str:
    value = run.setting(name)
    if name == "data.validation":
        return str([entry["corpus"] for entry in value])
    if name == "data.weights" and value:
        pairs = zip(run.setting("data.train"), value, strict=False)
        return ", ".join(f"{corpus}: {weight}" for corpus, weight in pairs)
    if isinstance(value, list):
        return ", ".join(map(str, value)) or "not set"
    return str(value) if value not in ("", None) else "not set"


def _why(baseline: Run, like_it: Sequence[Run], runs: Sequence[Run], corpus: str | None) -> str:
    others = _names([run for run in like_it if run is not baseline])
    data = ", ".join(map(str, baseline.setting("data.train")))
    parts = [
        f"Baseline: {baseline.name}. It trains on every token, and shares data ({data}), tokens "
        f"per step, model and start ({_start(like_it)}) with {others}."
    ]
    for run in runs:
        if not any(run is each for each in like_it):
            reason = run_differences(run, baseline, corpus)[0]
            parts.append(f"{run.name} is not measured against it: {reason}.")
    return " ".join(parts)


def _start(like_it: Sequence[Run]) -> str:
    """The initial weights that runs share, or that they are random ones."""
    if start := like_it[0].setting("checkpoint.initialize_from"):
        return f"the weights of {start}"
    seeds = {run.setting("run.seed") for run in like_it}
    return "random weights" if len(seeds) == 1 else "random weights, of different seeds"


def _why_none(runs: Sequence[Run], plain: Sequence[Run], corpus: str | None) -> str:
    if len(runs) == 1:
        return ""
    if not plain:
        return (
            "Baseline: none, for every run selects tokens. To have one, train with "
            "selection.scorer none on the same data, from the same weights."
        )
    first = plain[0]
    other = next(run for run in runs if run is not first)
    reason = run_differences(other, first, corpus)[0]
    return (
        f"Baseline: none. {_names(plain)} {'trains' if len(plain) == 1 else 'train'} on every "
        f"token, but {reason}; a baseline differs from the runs that select in the choice of "
        "tokens alone."
    )


def _names(runs: Sequence[Run]) -> str:
    names = [run.name for run in runs]
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
