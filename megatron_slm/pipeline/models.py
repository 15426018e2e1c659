"""The stages of a description that train, score, export and compare models."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import yaml

from megatron_slm.config.code import names_code
from megatron_slm.config.load import to_mapping
from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import train_steps
from megatron_slm.pipeline.description import Pipeline, Resources
from megatron_slm.pipeline.names import Found, Names
from megatron_slm.pipeline.outputs import Checkpoints, Files, Scores
from megatron_slm.pipeline.settings import run_config, score_options, what_a_run_learns_from
from megatron_slm.pipeline.stages import PROGRAM, PYTHON, SCORE, TRAIN, Stage, resources_of
from megatron_slm.scoring.options import ScoreOptions


def configs_of(
    description: Pipeline, names: Names, local: bool
) -> tuple[dict[str, Config], dict[str, list[Found]]]:
    """The configuration of every run that has a readable one, and what each run is made from.

    What is wrong is added to `names`.
    """
    configs, sources = {}, {}
    for name, run in description.runs.items():
        found = _sources(name, description, names)
        given = _given(found)
        given["run.folder"] = names.below(name)
        layers = [
            ("training.settings", description.training.settings),
            (f"runs.{name}.settings", run.settings),
        ]
        recipe = run.config or description.training.config
        world_size = processes(description, local, TRAIN, run.slurm)
        config, problems = run_config(recipe, layers, given, world_size)
        names.settings += [f"runs.{name}: {problem}" for problem in problems]
        if config is not None:
            configs[name] = config
        sources[name] = [
            each
            for value in found.values()
            for each in ([value] if isinstance(value, Found) else value)
        ]
    return configs, sources


def _sources(name: str, description: Pipeline, names: Names) -> dict:
    """Dotted setting -> what it refers to: one Found, a list, or for validation a dict."""
    run, where = description.runs[name], f"runs.{name}"
    validation = run.validation or description.training.validation
    if not run.train:
        names.settings.append(f"{where}.train: empty; name at least one corpus")
    found = {
        "data.tokenizer": names.tokenizer(),
        "data.train": [names.corpus(each, f"{where}.train") for each in run.train],
    }
    if validation:
        found["data.validation"] = _Validation(
            (each, names.corpus(corpus, f"{where}.validation.{each}"))
            for each, corpus in validation.items()
        )
    if run.scores:
        found["selection.reference.scores"] = [
            names.score_store(each, f"{where}.scores") for each in run.scores
        ]
    if run.reference:
        found["selection.reference.checkpoint"] = names.model(run.reference, f"{where}.reference")
    if run.start_from:
        found["checkpoint.initialize_from"] = names.model(run.start_from, f"{where}.start_from")
    return found


class _Validation(list):
    """Validation corpora, with their names in the metrics."""

    def __init__(self, named):
        self.named = dict(named)
        super().__init__(self.named.values())


def _given(found: Mapping) -> dict[str, object]:
    """The settings that the pipeline sets."""
    given: dict[str, object] = {}
    for setting, value in found.items():
        if isinstance(value, Found):
            given[setting] = value.path
        elif isinstance(value, _Validation):
            given[setting] = [
                {"name": name, "corpus": each.path} for name, each in value.named.items()
            ]
        else:
            given[setting] = [each.path for each in value]
    return given


def processes(description: Pipeline, local: bool, kind: str, entry: Resources) -> int:
    """Processes of one job."""
    if local:
        return description.local.processes
    resources = resources_of(description, kind, entry)
    return resources.nodes * resources.processes_per_node


def train_stages(
    description: Pipeline, names: Names, configs: dict[str, Config], sources: dict[str, list[Found]]
) -> Iterator[Stage]:
    for name, config in configs.items():
        path = names.below(f"pipeline/configs/{name}.yaml")
        steps = train_steps(config)
        scorer_file = config.selection.scorer.rpartition(":")[0]
        yield Stage(
            name,
            TRAIN,
            f"Train {name}: {steps:,} steps, scorer {config.selection.scorer}",
            ("--config", path, *named_code(config)),
            _after(sources[name]),
            Checkpoints(Path(names.below(name)), steps),
            {
                "run": what_a_run_learns_from(config),
                "from": [each.fingerprint for each in sources[name]],
            },
            reads=(scorer_file,) if Path(scorer_file).is_file() else (),
            makes=(name,),
            resources=resources_of(description, TRAIN, description.runs[name].slurm),
        )


def named_code(config: Config) -> list[str]:
    """Options that name a scorer's file again: train takes no code from a configuration alone."""
    selection = config.selection
    words = ["--selection.scorer", selection.scorer] if names_code(selection.scorer) else []
    options = yaml.safe_dump(selection.scorer_options, default_flow_style=True, width=10**6).strip()
    return words + (["--selection.scorer_options", options] if ".py:" in options else [])


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
        decides = ("window_tokens", "stride_tokens", "document_policy", "dtype", "columns")
        decides = {setting: written[setting] for setting in decides}
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
        words = ["--runs", *(run.path for run in runs), "--output", output]
        words += ["--corpus", description.report.corpus] if description.report.corpus else []
        yield Stage(
            "report",
            PROGRAM,
            "Report",
            (PYTHON, "-m", "megatron_slm.report", *words),
            _after(runs),
            Files((Path(output),)),
            {"report": description.report.corpus, "runs": description.report.runs},
            makes=("report.html",),
            resources=programs,
        )


def _after(sources: list[Found]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(name for each in sources for name in each.after))
