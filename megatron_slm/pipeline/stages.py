"""The stages of a description: what each runs, after which others, and what it writes."""

import graphlib
import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from megatron_slm.pipeline.description import Pipeline, Resources
from megatron_slm.pipeline.names import Found, Names, last_stage_of
from megatron_slm.pipeline.outputs import CorpusParts, Files, Manifests, Output

PROGRAM = "program"
PREPROCESS = "preprocess"
TRAIN = "train"
SCORE = "score"
PYTHON = "python"
"""First word of a program's command: the interpreter of wherever the stage runs."""


@dataclass(frozen=True)
class Stage:
    """One step of a pipeline."""

    name: str
    kind: str
    """program, preprocess, train or score: which script in launch/ starts it."""
    title: str
    command: tuple[str, ...]
    """The whole command of a program; of train and score, the arguments."""
    after: tuple[str, ...]
    """Stages that must have finished."""
    output: Output
    made_from: Any
    """What decides the output, as plain values, beside the stages before it and the files it reads.
    None: the same as for the one stage before it."""
    reads: tuple[str, ...] = ()
    """Files, folders and globs from outside the pipeline that decide the output."""
    makes: tuple[str, ...] = ()
    """Glob patterns, below the pipeline's folder, of everything it writes."""
    resources: Resources = field(default_factory=Resources)
    jobs: int = 1
    """Array jobs."""
    environment: tuple[tuple[str, str], ...] = ()
    """Variables that its batch script reads."""


def data_stages(description: Pipeline, names: Names) -> Iterator[Stage]:
    """Text, tokenizer, corpora and imported models."""
    tokenizer = names.tokenizer()
    if description.text.command:
        yield _text(description, names)
    if not description.tokenizer.path:
        yield _tokenizer(description, names)
    for name in description.corpora:
        yield from _corpus(name, description, names, tokenizer)
    for name, model in description.imports.items():
        source = str(Path(model.input).absolute())
        arguments = ["--input", source, "--output", names.below(name), "--dtype", model.dtype]
        if description.tokenizer.path:
            arguments += ["--tokenizer", tokenizer.path]
        yield Stage(
            name,
            PROGRAM,
            f"Import {model.input}",
            (PYTHON, "-m", "megatron_slm.import_hf", *arguments),
            (),
            Files((Path(names.below(name), "checkpoints"),)),
            {"import": model.dtype},
            reads=(f"{model.input}/config.json", f"{model.input}/*.safetensors"),
            makes=(name,),
            resources=resources_of(description, PROGRAM),
        )


def _text(description: Pipeline, names: Names) -> Stage:
    words = [
        os.path.abspath(word) if os.path.isfile(word) else word
        for word in names.expanded(description.text.command)
    ]
    return Stage(
        "text",
        PROGRAM,
        "Text",
        tuple(words),
        (),
        Files((Path(names.below("text")),)),
        {"text": description.text.command},
        reads=tuple(word for word in words[1:] if os.path.isfile(word)),
        makes=("text",),
        resources=resources_of(description, PROGRAM),
    )


def _tokenizer(description: Pipeline, names: Names) -> Stage:
    given, inputs = description.tokenizer, names.inputs(description.tokenizer.input)
    options = ["--vocab-size", str(given.vocabulary_size), "--model-type", given.model_type]
    options += ["--sample-bytes", str(given.sample_bytes)]
    options += _listed("--text-key", given.text_key) + _listed("--include", given.include)
    options += _listed("--special-token", given.special_tokens)
    prefix = names.below("tokenizer")
    return Stage(
        "tokenizer",
        PROGRAM,
        f"Tokenizer: SentencePiece, {given.vocabulary_size:,} pieces",
        (PYTHON, "-m", "tokenizer.train", "--input", *inputs, "--output-prefix", prefix, *options),
        _text_before(given.input, description),
        Manifests((Path(f"{prefix}.model"), Path(f"{prefix}.manifest.json"))),
        {"tokenizer": options, "inputs": _identity_of(given.input, description)},
        reads=_outside(given.input, names, description),
        makes=("tokenizer.*",),
        resources=resources_of(description, PROGRAM),
    )


def _corpus(name: str, description: Pipeline, names: Names, tokenizer: Found) -> Iterator[Stage]:
    """The stages of a corpus: preprocessing, joining its parts, verifying and holding out."""
    given = description.corpora[name]
    options = _corpus_options(name, description)
    variables = {
        "SLM_INPUT": " ".join(names.inputs(given.input)),
        "SLM_TOKENIZER": tokenizer.path,
        "SLM_OUTPUT": names.below(name),
        "SLM_OPTIONS": " ".join(options),
    }
    yield _preprocessing(name, description, names, tokenizer, options, variables)
    if given.jobs > 1:
        yield _joining(name, description, names, variables)
    if given.verify:
        yield Stage(
            f"{name}.verify",
            PROGRAM,
            f"Verify {name}",
            (PYTHON, "-m", "data_tools.verify", names.below(name)),
            (last_stage_of(name, given.jobs),),
            Files(()),
            {"verify": name},
            resources=resources_of(description, PROGRAM),
        )
    if given.held_out_fraction:
        yield _holding_out(name, description, names)


def _preprocessing(
    name: str,
    description: Pipeline,
    names: Names,
    tokenizer: Found,
    options: list[str],
    variables: dict[str, str],
) -> Stage:
    given, prefix = description.corpora[name], names.below(name)
    in_parts = given.jobs > 1
    inputs = names.inputs(given.input)
    arguments = ["--input", *inputs, "--tokenizer", tokenizer.path, "--output-prefix", prefix]
    arguments += ["--workers", str(given.workers), *options]
    kind = PREPROCESS if in_parts else PROGRAM
    cores = Resources(sbatch={"cpus_per_task": given.workers})
    return Stage(
        name,
        kind,
        f"Preprocess {name}: text to indexed binary",
        (PYTHON, "-m", "data_tools.preprocess", *arguments),
        _text_before(given.input, description) + tokenizer.after,
        CorpusParts(Path(prefix), given.jobs) if in_parts else _whole_corpus(prefix),
        {
            "corpus": options,
            "inputs": _identity_of(given.input, description),
            "tokenizer": tokenizer.fingerprint,
        },
        reads=_outside(given.input, names, description) + _predicate(given.keep_if),
        makes=(f"{name}.*",),
        resources=resources_of(description, kind, cores),
        jobs=given.jobs,
        environment=tuple(variables.items()) if in_parts else (),
    )


def _joining(name: str, description: Pipeline, names: Names, variables: dict[str, str]) -> Stage:
    """The last job of an array: the parts become one corpus."""
    jobs = str(description.corpora[name].jobs)
    environment = {**variables, "SLM_SHARDS": jobs, "SLM_MERGE": "1"}
    one_core = Resources(sbatch={"cpus_per_task": 1})
    return Stage(
        f"{name}.merge",
        PREPROCESS,
        f"Join the parts of {name}",
        (),
        (name,),
        _whole_corpus(names.below(name)),
        None,
        resources=resources_of(description, PREPROCESS, one_core),
        environment=tuple(environment.items()),
    )


def _holding_out(name: str, description: Pipeline, names: Names) -> Stage:
    given, prefix = description.corpora[name], names.below(name)
    choice = ["--held-out-fraction", str(given.held_out_fraction)]
    choice += ["--seed", str(given.held_out_seed)] if given.held_out_seed else []
    parts = (f"{name}_train", f"{name}_held_out")
    manifests = tuple(Path(f"{names.below(part)}.manifest.json") for part in parts)
    return Stage(
        f"{name}.split",
        PROGRAM,
        f"Hold out {given.held_out_fraction:.0%} of {name}",
        (PYTHON, "-m", "data_tools.split", prefix, *choice, "--output-prefix", prefix),
        (last_stage_of(name, given.jobs),),
        Manifests(manifests),
        {"split": choice},
        makes=tuple(f"{part}.*" for part in parts),
        resources=resources_of(description, PROGRAM),
    )


def _whole_corpus(prefix: str) -> Manifests:
    return Manifests((Path(f"{prefix}.manifest.json"),))


def _corpus_options(name: str, description: Pipeline) -> list[str]:
    """Options of data_tools.preprocess, without those that are its defaults."""
    given = description.corpora[name]
    options = _listed("--include", given.include)
    options += _listed("--text-key", given.text_key) if given.text_key != ["text"] else []
    for option, value, default in (
        ("--format", given.format, "auto"),
        ("--max-bad-fraction", given.max_bad_fraction, 0.05),
        ("--min-characters", given.min_characters, 0),
        ("--max-characters", given.max_characters, 0),
        ("--keep-if", os.path.abspath(given.keep_if) if given.keep_if else "", ""),
    ):
        options += [option, str(value)] if value != default else []
    if not given.append_eod:
        options.append("--no-append-eod")
    if given.prepend_bos:
        options.append("--prepend-bos")
    if given.drop_duplicates:
        options.append("--drop-duplicates")
    return options


def _predicate(keep_if: str) -> tuple[str, ...]:
    return (os.path.abspath(keep_if.rpartition(":")[0]),) if keep_if else ()


def _listed(option: str, values: list[str]) -> list[str]:
    return [option, *values] if values else []


def _made_here(inputs: list[str], description: Pipeline) -> bool:
    return bool(description.text.command) and any("{folder}" in word for word in inputs)


def _text_before(inputs: list[str], description: Pipeline) -> tuple[str, ...]:
    return ("text",) if _made_here(inputs, description) else ()


def _identity_of(inputs: list[str], description: Pipeline) -> list[str]:
    """The names of inputs that the stage text makes; of others the contents count."""
    return [word for word in inputs if _made_here([word], description)]


def _outside(inputs: list[str], names: Names, description: Pipeline) -> tuple[str, ...]:
    return tuple(names.inputs([word for word in inputs if not _made_here([word], description)]))


def resources_of(description: Pipeline, kind: str, entry: Resources | None = None) -> Resources:
    """An entry's resources over those of its kind over those of every job."""
    entry = entry or Resources()
    general = description.slurm
    of_kind = getattr(general, kind)
    return Resources(
        entry.nodes or of_kind.nodes or 1,
        entry.processes_per_node or of_kind.processes_per_node or 1,
        {**general.sbatch, **of_kind.sbatch, **entry.sbatch},
    )


def in_order(stages: list[Stage]) -> list[Stage]:
    """Every stage after those it needs. ValueError when some wait for each other."""
    by_name = {stage.name: stage for stage in stages}
    needed = {}
    for stage in stages:
        needed[stage.name] = [name for name in stage.after if name in by_name]
    try:
        return [by_name[name] for name in graphlib.TopologicalSorter(needed).static_order()]
    except graphlib.CycleError as error:
        circle = " needs ".join(reversed(error.args[1]))
        raise ValueError(f"the stages wait for each other in a circle: {circle}") from None
