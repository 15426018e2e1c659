"""The stages of a description that train, score, export and compare models."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from megatron_slm.config.code import names_code, parts_in_files
from megatron_slm.config.load import to_mapping
from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import train_steps
from megatron_slm.pipeline.description import Pipeline, Resources
from megatron_slm.pipeline.names import Found, Names
from megatron_slm.pipeline.outputs import Checkpoints, Files, Scores
from megatron_slm.pipeline.settings import run_config, score_options, what_a_run_learns_from
from megatron_slm.pipeline.stages import PROGRAM, PYTHON, SCORE, TRAIN, Stage, resources_of
from megatron_slm.scoring.options import ScoreOptions


@dataclass
class RunSources:
    """What one run is made from, by the settings that name it."""

    single: dict[str, Found] = field(default_factory=dict)
    several: dict[str, list[Found]] = field(default_factory=dict)
    validation: dict[str, Found] = field(default_factory=dict)
    """data.validation: corpora by their names in the metrics."""

    def settings(self) -> dict[str, object]:
        """The settings that the pipeline sets, by dotted names."""
        given: dict[str, object] = {name: found.path for name, found in self.single.items()}
        for name, found in self.several.items():
            given[name] = [each.path for each in found]
        if self.validation:
            given["data.validation"] = [
                {"name": name, "corpus": each.path} for name, each in self.validation.items()
            ]
        return given

    def all(self) -> list[Found]:
        """Everything, in a fixed order: the record of what a run was made from keeps it."""
        of = {name: [found] for name, found in self.single.items()} | self.several
        of["data.validation"] = list(self.validation.values())
        return [found for name in SOURCE_SETTINGS for found in of.get(name, [])]


SOURCE_SETTINGS = (
    "data.tokenizer",
    "data.train",
    "data.validation",
    "selection.reference.scores",
    "selection.reference.checkpoint",
    "checkpoint.initialize_from",
)


def configs_of(
    description: Pipeline, names: Names, local: bool
) -> tuple[dict[str, Config], dict[str, RunSources]]:
    """The configuration of every run that has a readable one, and what each run is made from.

    What is wrong is added to `names`.
    """
    configs: dict[str, Config] = {}
    sources: dict[str, RunSources] = {}
    for name, run in description.runs.items():
        sources[name] = _sources(name, description, names)
        given = sources[name].settings() | {"run.folder": names.below(name)}
        layers = (
            ("training.settings", description.training.settings),
            (f"runs.{name}.settings", run.settings),
        )
        recipe = run.config or description.training.config
        world_size = processes(description, local, TRAIN, run.slurm)
        config, problems = run_config(recipe, layers, given, world_size)
        names.settings += [f"runs.{name}: {problem}" for problem in problems]
        if config is not None:
            configs[name] = config
    return configs, sources


def _sources(name: str, description: Pipeline, names: Names) -> RunSources:
    """What a run refers to. What cannot be found is added to `names`."""
    run, where = description.runs[name], f"runs.{name}"
    validation = run.validation or description.training.validation
    if not run.train:
        names.settings.append(f"{where}.train: empty; name at least one corpus")
    found = RunSources()
    found.single["data.tokenizer"] = names.tokenizer()
    found.several["data.train"] = [names.corpus(each, f"{where}.train") for each in run.train]
    for each, corpus in validation.items():
        found.validation[each] = names.corpus(corpus, f"{where}.validation.{each}")
    if run.scores:
        found.several["selection.reference.scores"] = [
            names.score_store(each, f"{where}.scores") for each in run.scores
        ]
    if run.reference:
        reference = names.model(run.reference, f"{where}.reference")
        found.single["selection.reference.checkpoint"] = reference
    if run.start_from:
        start = names.model(run.start_from, f"{where}.start_from")
        found.single["checkpoint.initialize_from"] = start
    return found


def processes(description: Pipeline, local: bool, kind: str, entry: Resources) -> int:
    """Processes of one job."""
    if local:
        return description.local.processes
    resources = resources_of(description, kind, entry)
    return resources.nodes * resources.processes_per_node


def train_stages(
    description: Pipeline, names: Names, configs: dict[str, Config], sources: dict[str, RunSources]
) -> Iterator[Stage]:
    for name, config in configs.items():
        path = names.below(f"pipeline/configs/{name}.yaml")
        steps = train_steps(config)
        found = sources[name].all()
        yield Stage(
            name,
            TRAIN,
            f"Train {name}: {steps:,} steps, scorer {config.selection.scorer}",
            ("--config", path, *named_code(config)),
            _after(found),
            Checkpoints(Path(names.below(name)), steps),
            {
                "run": what_a_run_learns_from(config),
                "from": [each.fingerprint for each in found],
            },
            reads=_files_of_code(config),
            makes=(name,),
            resources=resources_of(description, TRAIN, description.runs[name].slurm),
        )


def named_code(config: Config) -> list[str]:
    """Options that name Python files again: train takes no code from a configuration alone."""
    selection = config.selection
    arguments = []
    if names_code(selection.scorer):
        arguments += ["--selection.scorer", selection.scorer]
    options = yaml.safe_dump(selection.scorer_options, default_flow_style=True, width=10**6).strip()
    if ".py:" in options:
        arguments += ["--selection.scorer_options", options]
    for setting, value in parts_in_files(config):
        flow = yaml.safe_dump(value, default_flow_style=True, width=10**6).strip()
        arguments += [f"--{setting}", flow if isinstance(value, list) else value]
    return arguments


def _files_of_code(config: Config) -> tuple[str, ...]:
    """Files of the user's whose code decides what a run learns."""
    named = (config.selection.scorer, config.optimizer.kind, config.schedule.style)
    paths = [name.rpartition(":")[0] for name in named]
    return tuple(path for path in paths if Path(path).is_file())


SCORE_SETTINGS = ("window_tokens", "stride_tokens", "document_policy", "dtype", "columns")
"""Options that decide the scores."""


def score_stages(
    description: Pipeline, names: Names, configs: dict[str, Config], local: bool
) -> Iterator[tuple[Stage, ScoreOptions]]:
    """Scorings, with their options. What is wrong is added to `names`."""
    for name, score in description.scores.items():
        where = f"scores.{name}"
        reference = names.model(score.reference, f"{where}.reference")
        corpus = names.corpus(score.corpus, f"{where}.corpus")
        options, problems = score_options(
            where,
            score.settings,
            reference.path,
            corpus.path,
            names.below(name),
            configs.get(score.reference),
            processes(description, local, SCORE, score.slurm),
        )
        names.settings += problems
        if problems:
            continue
        written = to_mapping(options)
        decides = {setting: written[setting] for setting in SCORE_SETTINGS}
        stage = Stage(
            name,
            SCORE,
            f"Score {score.corpus} with {score.reference}",
            ("--config", names.below(f"pipeline/configs/{name}.yaml")),
            _after([reference, corpus]),
            Scores(Path(names.below(name))),
            {
                "score": {**decides, "precision": options.device.precision},
                "from": [reference.fingerprint, corpus.fingerprint],
            },
            makes=(name,),
            resources=resources_of(description, SCORE, score.slurm),
            jobs=score.jobs,
        )
        yield stage, options


def closing_stages(description: Pipeline, names: Names) -> Iterator[Stage]:
    """Exports, their checks and the report."""
    programs = resources_of(description, PROGRAM)
    for name, export in description.exports.items():
        run, output = names.run(export.run, f"exports.{name}.run"), names.below(name)
        tokenizer = names.tokenizer()
        exporting = ("megatron_slm.export_hf", "--checkpoint", run.path, "--output", output)
        yield Stage(
            name,
            PROGRAM,
            f"Export {export.run} to Hugging Face",
            (PYTHON, "-m", *exporting, "--dtype", export.dtype),
            _after([run, tokenizer]),
            Files((Path(output, "config.json"),)),
            {"export": export.dtype},
            makes=(name,),
            resources=programs,
        )
        if export.check_on:
            corpus = names.corpus(export.check_on, f"exports.{name}.check_on")
            comparing = ("megatron_slm.check_export", "--checkpoint", run.path, "--export", output)
            yield Stage(
                f"{name}.check",
                PROGRAM,
                f"Compare the logits of {name} with those of {export.run}",
                (PYTHON, "-m", *comparing, "--corpus", corpus.path),
                (name, *_after([corpus])),
                Files(()),
                {"check": corpus.fingerprint},
                resources=programs,
            )
    if description.report.runs:
        runs = [names.run(each, "report.runs") for each in description.report.runs]
        output = names.below("report.html")
        arguments = ["--runs", *(run.path for run in runs), "--output", output]
        if description.report.corpus:
            arguments += ["--corpus", description.report.corpus]
        yield Stage(
            "report",
            PROGRAM,
            "Report",
            (PYTHON, "-m", "megatron_slm.report", *arguments),
            _after(runs),
            Files((Path(output),)),
            {"report": description.report.corpus, "runs": description.report.runs},
            makes=("report.html",),
            resources=programs,
        )


def _after(sources: list[Found]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in sources for name in each.after))
