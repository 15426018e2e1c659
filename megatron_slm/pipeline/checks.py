"""A description as stages, or everything that is wrong with it, before anything is started."""

import dataclasses
import glob
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.config.load import ConfigError, to_yaml
from megatron_slm.config.ranges import out_of_range
from megatron_slm.pipeline.description import Pipeline
from megatron_slm.pipeline.models import closing_stages, configs_of, score_stages, train_stages
from megatron_slm.pipeline.names import Names
from megatron_slm.pipeline.stages import Stage, data_stages, in_order
from megatron_slm.training.setup import RunInputError

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_-]*")
_TAKEN = ("pipeline", "text", "tokenizer", "report")
_SET_BY_SUBMIT = {
    "nodes": "give it as `nodes`, beside `sbatch`",
    "array": "give `jobs` of the entry",
    "dependency": "dependencies follow from the description",
    "job_name": "jobs are found again by their names",
    "output": "logs go to pipeline/logs in the pipeline's folder",
    "error": "logs go to pipeline/logs in the pipeline's folder",
    "export": "jobs get the environment that submit is called in",
    "parsable": "submit sets it",
    "wrap": "the scripts in launch/ are submitted",
    "test_only": "submit sets it",
    "kill_on_invalid_dep": "submit sets it",
    "export_file": "an environment can name code, and a description runs none; set it in "
    "launch/env.sh",
    "container": "a container is code, and a description runs none; name it in launch/env.sh",
    "bbf": "a description runs no code",
}
"""Options that a description cannot give. sbatch takes abbreviations, so their beginnings cannot
either."""


@dataclass(frozen=True)
class Assembled:
    """A checked description."""

    description: Pipeline
    stages: list[Stage]
    """Every stage after those it needs."""
    configs: dict[str, str]
    """Complete settings (YAML) of every training and scoring, by the stage's name."""

    @property
    def folder(self) -> Path:
        return Path(self.description.folder)


def assemble(description: Pipeline, local: bool) -> Assembled:
    """The stages of a description.

    ConfigError lists every bad setting and all that is missing; RunInputError is raised where
    the settings are sound and only files are missing or unfit.
    """
    given = dataclasses.replace(description, folder=str(Path(description.folder).absolute()))
    if local:
        given = _in_one_job(given)
    problems = [*_bad_settings(given), *([] if local else _bad_for_slurm(given))]
    names = Names(given)
    configs, sources = configs_of(given, names, local)
    scorings = list(score_stages(given, names, configs, local))
    stages = [
        *data_stages(given, names),
        *train_stages(given, names, configs, sources),
        *(stage for stage, _ in scorings),
        *closing_stages(given, names),
    ]
    missing = [*names.data, *_missing_files(given, names)]
    problems = list(dict.fromkeys(problems + names.settings))
    try:
        stages = in_order(stages)
    except ValueError as error:
        problems.append(str(error))
    if not stages and not problems:
        problems.append("nothing is described; give corpora, runs, scores or exports")
    if problems:
        raise ConfigError(problems + list(dict.fromkeys(missing)))
    if missing:
        raise RunInputError(list(dict.fromkeys(missing)))
    written = {name: to_yaml(config) for name, config in configs.items()}
    written |= {stage.name: to_yaml(options) for stage, options in scorings}
    return Assembled(given, stages, written)


def _in_one_job(description: Pipeline) -> Pipeline:
    """One machine does in one job what arrays share on a cluster."""
    corpora = {
        name: dataclasses.replace(each, jobs=1) for name, each in description.corpora.items()
    }
    scores = {name: dataclasses.replace(each, jobs=1) for name, each in description.scores.items()}
    return dataclasses.replace(description, corpora=corpora, scores=scores)


def _bad_settings(description: Pipeline) -> Iterator[str]:
    yield from (sentence for _, sentence in out_of_range(description))
    kinds = ("corpora", "imports", "runs", "scores", "exports")
    named = [(kind, name) for kind in kinds for name in getattr(description, kind)]
    made = []
    for name, corpus in description.corpora.items():
        if corpus.held_out_fraction:
            made += [f"{name}_train", f"{name}_held_out"]
    counts = Counter([name for _, name in named] + made + list(_TAKEN))
    for kind, name in named:
        if not _NAME.fullmatch(name):
            yield f"{kind}.{name}: a name has letters, digits, _ and -, for it names files"
        elif counts[name] > 1:
            yield f"{kind}.{name}: the name is taken; every entry writes files of its own name"
    tokenizer = description.tokenizer
    if bool(tokenizer.path) == bool(tokenizer.input):
        got = "both are" if tokenizer.path else "neither is"
        yield f"tokenizer: {got} given; give path (one that exists) or input (to train one)"
    if tokenizer.input and not tokenizer.vocabulary_size:
        yield "tokenizer.vocabulary_size: got 0; expected the number of ids to train"
    for name, corpus in description.corpora.items():
        if not corpus.input:
            yield f"corpora.{name}.input: empty; give files, folders or globs of text"
        if corpus.drop_duplicates and corpus.jobs > 1:
            yield (
                f"corpora.{name}.drop_duplicates: got true with jobs {corpus.jobs}; duplicates "
                "are found in one job only"
            )
        if 0 < corpus.max_characters < corpus.min_characters:
            yield (
                f"corpora.{name}.max_characters: got {corpus.max_characters}, below "
                f"min_characters ({corpus.min_characters})"
            )
    for name, model in description.imports.items():
        if not model.input:
            yield f"imports.{name}.input: empty; give a Hugging Face folder"


def _bad_for_slurm(description: Pipeline) -> Iterator[str]:
    """What only sbatch and the batch scripts cannot take."""
    slurm = description.slurm
    given = {"slurm.sbatch": slurm.sbatch}
    for kind in ("program", "preprocess", "train", "score"):
        given[f"slurm.{kind}.sbatch"] = getattr(slurm, kind).sbatch
    for section in ("runs", "scores"):
        for name, entry in getattr(description, section).items():
            given[f"{section}.{name}.slurm.sbatch"] = entry.slurm.sbatch
    for where, options in given.items():
        for option, value in options.items():
            name = str(option).replace("-", "_")
            reserved = [each for each in _SET_BY_SUBMIT if each.startswith(name)]
            if reserved:
                yield f"{where}.{option}: {_SET_BY_SUBMIT[reserved[0]]}"
            elif isinstance(value, (dict, list)) or value is None:
                yield f"{where}.{option}: got {value!r}; expected one value"
            elif name in ("time", "time_min") and not isinstance(value, str):
                # YAML reads 04:00:00 as the number 14400, and sbatch that as minutes.
                yield f"{where}.{option}: got {value!r}; write it in quotes"
    for name, corpus in description.corpora.items():
        words = [*corpus.input, *corpus.include, *corpus.text_key, corpus.keep_if]
        words += [description.folder, description.tokenizer.path]
        spaced = [word for word in words if re.search(r"\s", word)]
        if corpus.jobs > 1 and spaced:
            yield (
                f"corpora.{name}: {spaced[0]!r} has spaces, which launch/preprocess.sbatch splits "
                "at; use one job, or another name"
            )


def _missing_files(description: Pipeline, names: Names) -> Iterator[str]:
    inputs = {"tokenizer.input": description.tokenizer.input}
    for name, corpus in description.corpora.items():
        inputs[f"corpora.{name}.input"] = corpus.input
    for where, words in inputs.items():
        for word, path in zip(words, names.expanded(words), strict=True):
            made_by_text = description.text.command and "{folder}" in word
            if not made_by_text and not Path(path).exists() and not glob.glob(path):
                yield f"{where}: {path}: no such file or folder, and no file matches it"
    for name, model in description.imports.items():
        if model.input and not Path(model.input, "config.json").is_file():
            yield (
                f"imports.{name}.input: {model.input} holds no config.json; expected a Hugging "
                "Face folder"
            )
    for name, corpus in description.corpora.items():
        file = corpus.keep_if.rpartition(":")[0]
        if corpus.keep_if and not Path(file).is_file():
            yield (
                f"corpora.{name}.keep_if: got {corpus.keep_if!r}; expected FILE.py:FUNCTION of a "
                "file that exists"
            )
