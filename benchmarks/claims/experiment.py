"""Declarations: experiments/NAME.yaml, scales.yaml and pairs.yaml, read and checked.

An experiment names models, score stores and arms:

    models:   reference: {start: base, train: [curated], length: reference}
    stores:   scores: {model: reference}
    arms:     slm: {scores: scores, settings: {selection: {scorer: excess_loss}}}

`base` is always there: plain training on the corpus from random weights. A model or an arm has
`start` (a model, an earlier arm, or none for random weights), `train` (corpora), `length` (of
scales.yaml) times `times`, and settings of megatron_slm.train that differ from the scale's.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.claims.noise import KINDS, WORDS
from megatron_slm.config.build import build_settings
from megatron_slm.config.yaml_text import read_yaml

FOLDER = Path(__file__).resolve().parent
NO_START = "none"
BASE = "base"
LENGTHS = ("base", "reference", "arm")
TEXT_CORPORA = ("corpus", "curated", "held_out")


@dataclass
class Training:
    """A model or an arm: one run of megatron_slm.train for each seed."""

    start: str = BASE
    """A model, an arm (its weights), or none."""
    train: list[str] = field(default_factory=lambda: ["corpus"])
    """Corpora, blended by their size in tokens."""
    length: str = "arm"
    """Whose tokens of scales.yaml the run processes."""
    times: float = 1.0
    """So many times as many."""
    plus: str = ""
    """A length of scales.yaml whose tokens come on top: `reference` for an arm that may spend what
    others spend on theirs."""
    scores: str = ""
    """A store that is read beside the corpora."""
    online: str = ""
    """A model that is run as reference in every step."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Sections of megatron_slm.train. A size can be {of_scale: 0.25}, a quarter of the scale's; the
    lengths of a schedule are shares of the run, tokens_of_run and hold_of_run."""
    after_step: str = ""
    """monitoring.after_step of the run, FILE.py:NAME below the checkout: code that changes what no
    setting changes."""
    against: str = ""
    """The arm whose loss is subtracted, pair by pair of the same seed; empty = the experiment's
    baseline."""
    label: str = ""
    """How pages and figures name it; empty = its name."""


@dataclass
class Store:
    """Scores of every corpus that the arms with this store train on, by one model."""

    model: str = ""
    options: dict[str, Any] = field(default_factory=dict)
    """Of megatron_slm.score."""


@dataclass
class Experiment:
    """One file of experiments/."""

    title: str = ""
    question: str = ""
    """What is asked, in a sentence or two; printed above the results."""
    pairs: list[str] = field(default_factory=lambda: ["code"])
    seeds: int = 3
    """Seeds that a result needs before anything is claimed from it."""
    baseline: str = "plain"
    planted: dict[str, Any] = field(default_factory=dict)
    """Kind of noise -> the share of the corpus's characters that is added of it."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Of every arm."""
    models: dict[str, Training] = field(default_factory=dict)
    stores: dict[str, Store] = field(default_factory=dict)
    arms: dict[str, Training] = field(default_factory=dict)
    contrasts: dict[str, Any] = field(default_factory=dict)
    """Arm -> further arms that it is compared with."""
    token_noise: dict[str, Any] = field(default_factory=dict)
    """Arm -> the store whose losses are subtracted from the trained arm's to rank the tokens of the
    planted corpus `words` (token_noise.py)."""
    missing: dict[str, Any] = field(default_factory=dict)
    """What belongs to the question and is not measured -> why; printed with the results."""
    name: str = ""
    """The file's, without its ending."""

    @property
    def trainings(self) -> dict[str, Training]:
        """Models and arms by name, the base among them."""
        base = Training(start=NO_START, length="base")
        return {BASE: base, **self.models, **self.arms}

    def label(self, arm: str) -> str:
        return self.arms[arm].label or arm

    def against(self, arm: str) -> str:
        return self.arms[arm].against or self.baseline


@dataclass
class Scale:
    """One entry of scales.yaml."""

    characters: dict[str, Any] = field(default_factory=dict)
    vocabulary: int = 0
    tokens: dict[str, Any] = field(default_factory=dict)
    """Processed tokens of base, reference and arm."""
    validations: int = 8
    """Validations of an arm, beside the one before its first step."""
    settings: dict[str, Any] = field(default_factory=dict)
    workers: int = 1
    """Processes of preprocessing."""
    launch: dict[str, Any] = field(default_factory=dict)
    """What stands before train, score and other programs; empty = python -m, here."""
    name: str = ""


def experiment_names() -> list[str]:
    return sorted(path.stem for path in (FOLDER / "experiments").glob("*.yaml"))


def read_experiment(name: str) -> Experiment:
    """The experiment of a name. ValueError lists everything that is wrong with its file."""
    path = FOLDER / "experiments" / f"{name}.yaml"
    if not path.is_file():
        raise ValueError(f"got {name!r}; expected one of {', '.join(experiment_names())}")
    content = read_yaml(path.read_text(encoding="utf-8"))
    problems: list[str] = []
    experiment = build_settings(Experiment, {**content, "name": name}, "", problems)
    problems = problems or list(experiment_problems(experiment))
    if problems:
        raise ValueError("".join(f"\n  - {name}.yaml: {problem}" for problem in problems))
    return experiment


def experiment_problems(experiment: Experiment) -> Iterator[str]:
    """Names that an experiment uses and does not have, one sentence each."""
    known = experiment.trainings
    corpora = {*TEXT_CORPORA, *experiment.planted}
    for kind in set(experiment.planted) - set(KINDS):
        yield f"planted: got {kind!r}; expected some of {', '.join(KINDS)}"
    for name, training in known.items():
        earlier = list(known)[: list(known).index(name)]
        if training.start not in (NO_START, *earlier):
            yield f"{name}.start: got {training.start!r}; expected none or one of {earlier}"
        if training.online and training.online not in earlier:
            yield f"{name}.online: got {training.online!r}; expected one of {earlier}"
        if training.scores and training.scores not in experiment.stores:
            yield f"{name}.scores: got {training.scores!r}; expected one of the stores"
        if training.length not in LENGTHS:
            yield f"{name}.length: got {training.length!r}; expected one of {LENGTHS}"
        if training.plus and training.plus not in LENGTHS:
            yield f"{name}.plus: got {training.plus!r}; expected one of {LENGTHS}"
        for corpus in set(training.train) - corpora:
            yield f"{name}.train: got {corpus!r}; expected some of {sorted(corpora)}"
    for name, store in experiment.stores.items():
        if store.model not in known:
            yield f"stores.{name}.model: got {store.model!r}; expected one of {list(known)}"
    for name, store in experiment.token_noise.items():
        if name not in experiment.arms or store not in experiment.stores or WORDS not in corpora:
            yield (
                f"token_noise.{name}: needs an arm, a store ({store!r}) and the planted corpus "
                f"{WORDS}"
            )
    for name, others in experiment.contrasts.items():
        for other in {name, *others} - set(experiment.arms):
            yield f"contrasts.{name}: got {other!r}, which is no arm"
    for name in experiment.arms:
        if experiment.against(name) not in experiment.arms:
            yield f"arms.{name}: is compared with {experiment.against(name)!r}, which is no arm"


def read_scale(name: str) -> Scale:
    """One entry of scales.yaml."""
    scales = read_yaml((FOLDER / "scales.yaml").read_text(encoding="utf-8"))
    if name not in scales:
        raise ValueError(f"got {name!r}; expected one of {', '.join(scales)}")
    problems: list[str] = []
    scale = build_settings(Scale, {**scales[name], "name": name}, "", problems)
    if problems:
        raise ValueError("".join(f"\n  - scales.yaml {name}: {problem}" for problem in problems))
    return scale


def read_pairs() -> Mapping[str, Any]:
    """pairs.yaml."""
    pairs = read_yaml((FOLDER / "pairs.yaml").read_text(encoding="utf-8"))
    return dict(pairs)
