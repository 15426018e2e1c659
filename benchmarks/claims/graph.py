"""An experiment as stages: runs of the real programs, each in a folder named by what it is made of.

The name of a stage's folder ends in a hash of its settings and of the stages before it. Two
experiments that need the same run share it, a finished run is never made again, and settings that
change are other runs.
"""

import hashlib
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from benchmarks.claims.experiment import BASE, NO_START, Experiment, Scale, Training
from benchmarks.claims.noise import WORDS

SEED_STEP = 100
ARM_PLACE = 99
"""Seed s of an experiment is run.seed 100 s + the place of a model in it, or + 99 for every arm."""
OF_SCALE = "of_scale"
OF_RUN = {"tokens_of_run": "tokens", "hold_of_run": "hold_tokens"}
"""In schedules of a keep fraction or of lambda: shares of the run, in place of tokens."""
SCHEDULES = ("keep_fraction", "clm_weight")
"""Settings of the selection that may be a schedule, which another one replaces as a whole."""


@dataclass(frozen=True, eq=False)
class Stage:
    """One program's run, or text that this process writes. Two are equal when their keys are."""

    kind: str
    """text, noise, tokenizer, corpus, train or score."""
    name: str
    identity: dict[str, Any]
    """What the result depends on, besides the stages before it."""
    needs: tuple["Stage", ...] = ()

    @cached_property
    def key(self) -> str:
        """The folder's name, unique for what the stage is made of."""
        content = [self.kind, self.identity, [stage.key for stage in self.needs]]
        digest = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
        return f"{self.kind}-{self.name}-{digest[:10]}"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Stage) and self.key == other.key

    def __hash__(self) -> int:
        return hash(self.key)


def merged(*settings: Mapping[str, Any]) -> dict[str, Any]:
    """Nested settings over each other; later ones win."""
    result: dict[str, Any] = {}
    for mapping in settings:
        for key, value in mapping.items():
            both = isinstance(value, Mapping) and isinstance(result.get(key), Mapping)
            result[key] = merged(result[key], value) if both and key not in SCHEDULES else value
    return result


def resolved(settings: Mapping[str, Any], scale: Mapping[str, Any]) -> dict[str, Any]:
    """Settings in which {of_scale: 0.25} has become a quarter of what the scale has there."""
    result: dict[str, Any] = {}
    for key, value in settings.items():
        if not isinstance(value, Mapping):
            result[key] = value
        elif OF_SCALE in value:
            result[key] = round(scale[key] * value[OF_SCALE])
        else:
            inner = scale.get(key)
            result[key] = resolved(value, inner if isinstance(inner, Mapping) else {})
    return result


class Graph:
    """The stages of one experiment, one pair and one seed, by what they are for."""

    def __init__(
        self,
        experiment: Experiment,
        scale: Scale,
        pair_name: str,
        pair: Mapping[str, Any],
        seed: int,
        texts: str = "",
    ):
        self.experiment = experiment
        self.scale = scale
        self.seed = seed
        identity = {"pair": dict(pair), "characters": scale.characters}
        self.text = Stage("text", pair_name, {"folder": texts} if texts else identity)
        self.tokenizer = Stage(
            "tokenizer", pair_name, {"vocabulary": scale.vocabulary}, (self.text,)
        )
        self._made: dict[str, Stage] = {}

    def arms(self, names: list[str]) -> dict[str, Stage]:
        """Arm -> its run."""
        return {name: self.training(name) for name in names}

    def measures(self, names: list[str]) -> list[Stage]:
        """What is scored with the trained arms, beside their runs."""
        return [self.trained_scores(name) for name in names if name in self.experiment.token_noise]

    def trained_scores(self, arm: str) -> Stage:
        """The corpus of planted words, scored with an arm's last checkpoint."""
        needs = (self.training(arm), self.corpus(WORDS))
        return Stage("score", f"trained_{arm}_{WORDS}", {"options": {}}, needs)

    def corpus(self, name: str) -> Stage:
        """A corpus of the text, or of planted noise."""
        text = self.text
        if name in self.experiment.planted:
            share = self.experiment.planted[name]
            text = Stage("noise", name, {"share": share}, (self.text,))
        return Stage("corpus", name, {"corpus": name}, (text, self.tokenizer))

    def training(self, name: str) -> Stage:
        """The run of a model or an arm."""
        if name not in self._made:
            self._made[name] = self._training(name, self.experiment.trainings[name])
        return self._made[name]

    def _training(self, name: str, training: Training) -> Stage:
        needs = [self.tokenizer, *map(self.corpus, training.train), self.corpus("held_out")]
        roles: dict[str, Any] = {"train": training.train}
        if training.start != NO_START:
            roles["start"] = len(needs)
            needs.append(self.training(training.start))
        if training.online:
            roles["online"] = len(needs)
            needs.append(self.training(training.online))
        if training.scores:
            roles["scores"] = len(needs)
            needs += [self.scores(training.scores, corpus) for corpus in training.train]
        settings = self._settings(name, training)
        identity = {"roles": roles, "settings": settings}
        if training.after_step:
            identity["after_step"] = training.after_step
        return Stage("train", name, identity, tuple(needs))

    def _settings(self, name: str, training: Training) -> dict[str, Any]:
        """Settings of megatron_slm.train, but for the paths."""
        shared = self.experiment.settings if name in self.experiment.arms else {}
        own = resolved(merged(shared, training.settings), self.scale.settings)
        settings = merged(self.scale.settings, own)
        data = settings["data"]
        step_tokens = data["sequence_length"] * data["global_batch_size"]
        lengths = self.scale.tokens
        tokens = lengths[training.length] * training.times + lengths.get(training.plus, 0)
        steps = math.ceil(tokens / step_tokens)
        interval = max(steps // self.scale.validations, 1)
        models = [BASE, *self.experiment.models]
        place = models.index(name) if name in models else ARM_PLACE
        fixed = {
            "run": {"seed": SEED_STEP * self.seed + place},
            "schedule": {"train_steps": steps},
            "monitoring": {"validation_interval_steps": interval},
        }
        selection = settings.get("selection", {"scorer": "none"})
        for schedule in SCHEDULES:
            if isinstance(selection.get(schedule), Mapping):
                selection = {
                    **selection,
                    schedule: _in_tokens(selection[schedule], steps * step_tokens),
                }
        return merged(settings, fixed, {"selection": selection})

    def scores(self, name: str, corpus: str) -> Stage:
        """A store of one corpus."""
        store = self.experiment.stores[name]
        needs = (self.training(store.model), self.corpus(corpus))
        return Stage("score", f"{name}_{corpus}", {"options": store.options}, needs)


def _in_tokens(schedule: Mapping[str, Any], run_tokens: int) -> dict[str, Any]:
    """A schedule whose lengths are given as shares of the run, as the framework takes it."""
    return {
        OF_RUN.get(key, key): round(value * run_tokens) if key in OF_RUN else value
        for key, value in schedule.items()
    }


def in_order(stages: list[Stage]) -> list[Stage]:
    """Stages with all that they need, each after what it needs, once."""
    found: dict[str, Stage] = {}

    def visit(stage: Stage) -> None:
        if stage.key not in found:
            for needed in stage.needs:
                visit(needed)
            found[stage.key] = stage

    for stage in stages:
        visit(stage)
    return list(found.values())


def folder_of(stage: Stage, folder: Path) -> Path:
    return folder / stage.key
