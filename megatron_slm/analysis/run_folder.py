"""Read a run folder as it is, finished or not: metrics.jsonl, config.yaml, status.json,
versions.txt, warnings.jsonl, token_view.jsonl, evaluations.jsonl.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from megatron_slm.analysis.run_state import RunState, place, read_state
from megatron_slm.analysis.token_viewer import TokenView, read_token_views
from megatron_slm.config.yaml_text import read_yaml
from megatron_slm.evaluation.table import EVALUATIONS
from megatron_slm.selection.alarms import ranks_tokens

PROCESSED = "tokens/processed"
SELECTED = "tokens/selected"


@dataclass(frozen=True)
class Run:
    """One run. `training` and `validation` are records of metrics.jsonl in order of their steps."""

    name: str
    folder: Path
    config: Mapping[str, Any]
    training: list[dict[str, Any]]
    validation: list[dict[str, Any]]
    state: RunState = field(default_factory=lambda: RunState("unknown", 0))
    versions: str = ""
    warnings: list[str] = field(default_factory=list)
    token_views: list[TokenView] = field(default_factory=list)
    evaluations: list[dict[str, Any]] = field(default_factory=list)
    """Records of megatron_slm.evaluate, in the order they were made."""
    unreadable_lines: int = 0

    @property
    def scorer(self) -> str:
        return str(self.setting("selection.scorer", "none"))

    @property
    def is_plain(self) -> bool:
        """Whether every token is trained on: no scorer, or a keep fraction of 1."""
        return self.scorer == "none" or self.setting("selection.keep_fraction", 0.6) == 1.0

    @property
    def ranks_in_nats(self) -> bool:
        """Whether the run chooses by a score in nats; random scores have no such threshold."""
        return ranks_tokens(self.scorer, self.setting("selection.keep_fraction", 0.6))

    @property
    def selection_ended(self) -> bool:
        """Whether selection.end_when_overtaken has ended the selection before the run's end."""
        kept = self.series("selection/kept_fraction")[1]
        may_end = self.setting("selection.end_when_overtaken", False)
        return bool(may_end and len(kept) and kept[-1] == 1.0)

    def setting(self, dotted: str, default: Any = None) -> Any:
        """A value of config.yaml by its dotted name."""
        value: Any = self.config
        for key in dotted.split("."):
            if not isinstance(value, Mapping) or key not in value:
                return default
            value = value[key]
        return value

    def series(self, name: str, x: str = PROCESSED) -> tuple[np.ndarray, np.ndarray]:
        """(x, values) of a scalar metric, from training or validation records by its name.

        Records without it are left out.
        """
        records = self.validation if name.startswith("validation/") else self.training
        places, values = [], []
        for record in records:
            place = self._x(record, x)
            if place is not None and _is_number(record.get(name)):
                places.append(place)
                values.append(record[name])
        return np.array(places, float), np.array(values, float)

    def vectors(self, name: str) -> tuple[np.ndarray, np.ndarray]:
        """(processed tokens [R], values [R, n]) of a metric that is a list of n numbers.

        null becomes NaN. Records with another n than the last one are left out.
        """
        rows = [
            (record[PROCESSED], record[name])
            for record in self.training
            if isinstance(record.get(name), list)
            and record[name]
            and _is_number(record.get(PROCESSED))
        ]
        if not rows:
            return np.zeros(0), np.zeros((0, 0))
        length = len(rows[-1][1])
        rows = [row for row in rows if len(row[1]) == length]
        processed = [tokens for tokens, _ in rows]
        values = [values for _, values in rows]
        return np.array(processed, float), np.array(values, float)  # None becomes NaN

    def validation_names(self) -> list[str]:
        """Names of the validation corpora that have a loss, in the config's order."""
        found = {
            key.removeprefix("validation/").removesuffix("/loss")
            for record in self.validation
            for key in record
            if key.startswith("validation/") and key.endswith("/loss")
        }
        configured = self.setting("data.validation") or []
        order = [corpus.get("name") for corpus in configured if isinstance(corpus, Mapping)]
        return sorted(
            found, key=lambda name: (order.index(name) if name in order else len(order), name)
        )

    def last(self, name: str) -> float | None:
        """The latest value of a scalar metric, None when there is none."""
        values = self.series(name, x="step")[1]
        return float(values[-1]) if len(values) else None

    def not_final(self, name: str) -> str:
        """What to say of `last(name)` where the run did not end there.

        It is of the form "last, at step 60 of 120", and empty for a final value.
        """
        steps = self.series(name, x="step")[0]
        if not len(steps) or (self.state.is_finished and steps[-1] >= self.state.step):
            return ""
        return f"last, at {place(int(steps[-1]), self.state.steps)}"

    def _x(self, record: Mapping[str, Any], x: str) -> float | None:
        if _is_number(record.get(x)):
            return record[x]
        if x != SELECTED or not _is_number(record.get(PROCESSED)):
            return None
        if self.is_plain:
            return record[PROCESSED]
        known = [(0, 0)] + [
            (line[PROCESSED], line[SELECTED])
            for line in self.training
            if _is_number(line.get(PROCESSED)) and _is_number(line.get(SELECTED))
        ]
        if len(known) == 1:
            return None
        return float(np.interp(record[PROCESSED], *np.array(known, float).T))


def read_run(folder: str | Path) -> Run:
    """Read a run folder. Torn lines are counted.

    ValueError, as a sentence, when there is no run with metrics in it.
    """
    folder = Path(folder)
    metrics = folder / "metrics.jsonl"
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder; give the run.folder of a training run")
    config = _read_config(folder / "config.yaml")
    records, unreadable = read_jsonl(metrics)
    records = [record for record in records if _is_number(record.get("step"))]
    state = read_state(folder, config, max((record["step"] for record in records), default=0))
    if not metrics.is_file() and not state.is_told:
        raise ValueError(
            f"{folder}: holds no metrics.jsonl, so it is not a run folder of megatron_slm.train "
            "(or the run never started)"
        )
    training, validation = (_by_step(records, kind) for kind in ("train", "validation"))
    if not training and not validation:
        status = f" Its status: {state.description}" if state.is_told else ""
        reason = f": {state.reason}" if state.reason else ""
        raise ValueError(
            f"{metrics}: holds no metrics yet; the run ended before its first log interval "
            f"(monitoring.log_interval_steps), or is still starting.{status}{reason}"
        )
    name = (config.get("run") or {}).get("name") or folder.resolve().name
    warnings, _ = read_jsonl(folder / "warnings.jsonl")
    texts = [str(line["text"]) for line in warnings if line.get("text")]
    versions = folder / "versions.txt"
    return Run(
        name=str(name),
        folder=folder,
        config=config,
        training=training,
        validation=validation,
        state=state,
        unreadable_lines=unreadable,
        versions=versions.read_text(errors="replace").strip() if versions.is_file() else "",
        warnings=list(dict.fromkeys(texts)),  # a resume repeats some
        token_views=read_token_views(folder / "token_view.jsonl"),
        evaluations=_read_evaluations(folder / EVALUATIONS),
    )


def read_runs(folders: list[str | Path]) -> list[Run]:
    """Several run folders, with names that differ.

    ValueError with a sentence for every folder that cannot be read.
    """
    runs, problems = [], []
    for folder in folders:
        try:
            runs.append(read_run(folder))
        except ValueError as error:
            problems.append(str(error))
    if problems:
        raise ValueError("\n".join(problems))
    names = [run.name for run in runs]
    return [
        run if names.count(run.name) == 1 else replace(run, name=str(run.folder)) for run in runs
    ]


def read_jsonl(path: Path) -> tuple[list[dict[str, Any]], int]:
    """(objects, number of lines that are none) of a JSON-lines file; an absent file has none."""
    if not path.is_file():
        return [], 0
    records, unreadable = [], 0
    for line in path.read_bytes().splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            record = None
        if isinstance(record, dict):
            records.append(record)
        else:
            unreadable += 1
    return records, unreadable


def _read_evaluations(path: Path) -> list[dict[str, Any]]:
    """The records of an evaluations.jsonl that are whole: lines that a kill has torn, and what is
    none of ours, are left out.
    """
    return [record for record in read_jsonl(path)[0] if _is_evaluation(record)]


def _is_evaluation(record: dict[str, Any]) -> bool:
    sections = [record.get(name) for name in ("corpora", "settings", "token_sets", "metrics")]
    if not all(isinstance(section, dict) for section in sections):
        return False
    settings = {"sequences", "sequence_length", "document_policy", "precision"}
    values = record["metrics"].values()
    return (
        settings <= record["settings"].keys()
        and _is_number(record.get("step"))
        and all(value is None or _is_number(value) for value in values)
    )


def _by_step(records: list[dict[str, Any]], kind: str) -> list[dict[str, Any]]:
    """Records of a kind, one per step (the latest written counts), sorted."""
    by_step = {record["step"]: record for record in records if record.get("kind", "train") == kind}
    return [by_step[step] for step in sorted(by_step)]


def _read_config(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        config = read_yaml(path.read_text())
    except yaml.YAMLError as error:
        raise ValueError(f"{path}: not readable as YAML: {str(error).splitlines()[0]}") from None
    return config if isinstance(config, dict) else {}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
