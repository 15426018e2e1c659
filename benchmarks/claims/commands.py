"""The command line of a stage: a program that a user runs, with the files of earlier stages."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks.claims.graph import Stage, folder_of, merged

SAMPLE_BYTES = "8000000"
SCORING_WINDOWS = 32
"""Windows of one forward pass; the scores do not depend on it."""


def text_folder(stage: Stage, folder: Path) -> Path:
    """Where the jsonl files of a text stage lie."""
    given = stage.identity.get("folder")
    return Path(given) if given else folder_of(stage, folder)


def vocabulary_file(stage: Stage, folder: Path) -> Path:
    return folder_of(stage, folder) / "tokenizer.model"


def corpus_prefix(stage: Stage, folder: Path) -> Path:
    return folder_of(stage, folder) / stage.name


def command_of(stage: Stage, folder: Path, workers: int = 1) -> list[str]:
    """Module and arguments. Writes the settings file of a run of training."""
    if stage.kind == "corpus":
        return _corpus(stage, folder, workers)
    return {"tokenizer": _tokenizer, "train": _train, "score": _score}[stage.kind](stage, folder)


def _tokenizer(stage: Stage, folder: Path) -> list[str]:
    text = text_folder(stage.needs[0], folder) / "corpus.jsonl"
    prefix = vocabulary_file(stage, folder).with_suffix("")
    size = str(stage.identity["vocabulary"])
    words = ["--input", str(text), "--output-prefix", str(prefix), "--vocab-size", size]
    options = ["--sample-bytes", SAMPLE_BYTES, "--threads", "1", "--overwrite"]
    return ["tokenizer.train", *words, *options]


def _corpus(stage: Stage, folder: Path, workers: int) -> list[str]:
    text, tokenizer = stage.needs
    return [
        "data_tools.preprocess",
        *("--input", str(text_folder(text, folder) / f"{stage.name}.jsonl")),
        *("--tokenizer", str(vocabulary_file(tokenizer, folder))),
        *("--output-prefix", str(corpus_prefix(stage, folder))),
        *("--workers", str(workers)),
    ]


def _train(stage: Stage, folder: Path) -> list[str]:
    # with_suffix would take the .5 of an arm named keep_0.5 away, and arms would share a file.
    path = Path(f"{folder_of(stage, folder)}.yaml")
    path.write_text(yaml.safe_dump(run_settings(stage, folder), sort_keys=False))
    words = ["megatron_slm.train", "--config", str(path)]
    if hook := stage.identity.get("after_step"):
        # Only a command line can name a file whose code is run.
        words += ["--monitoring.after_step", hook]
    return words


def run_settings(stage: Stage, folder: Path) -> dict[str, Any]:
    """Every setting of a run that is not the default."""
    roles: Mapping[str, Any] = stage.identity["roles"]
    tokenizer = stage.needs[0]
    corpora = stage.needs[1 : 1 + len(roles["train"])]
    held_out = stage.needs[1 + len(roles["train"])]
    paths: dict[str, Any] = {
        "run": {"folder": str(folder_of(stage, folder)), "name": stage.name},
        "data": {
            "tokenizer": str(vocabulary_file(tokenizer, folder)),
            "train": [str(corpus_prefix(corpus, folder)) for corpus in corpora],
            "validation": [{"name": "target", "corpus": str(corpus_prefix(held_out, folder))}],
        },
    }
    if "start" in roles:
        start = folder_of(stage.needs[roles["start"]], folder)
        paths["checkpoint"] = {"initialize_from": str(start)}
    reference: dict[str, Any] = {}
    if "online" in roles:
        reference["checkpoint"] = str(folder_of(stage.needs[roles["online"]], folder))
    if "scores" in roles:
        stores = stage.needs[roles["scores"] :]
        reference["scores"] = [str(folder_of(store, folder)) for store in stores]
    if reference:
        paths["selection"] = {"reference": reference}
    return merged(stage.identity["settings"], paths)


def _score(stage: Stage, folder: Path) -> list[str]:
    model, corpus = stage.needs
    options = {"micro_batch_size": SCORING_WINDOWS, **stage.identity["options"]}
    if "device" in model.identity["settings"]:
        device = model.identity["settings"]["device"]
        kept = ("kind", "threads_per_process")
        options |= {f"device.{name}": device[name] for name in kept if name in device}
    words = [(f"--{name}", _as_word(value)) for name, value in options.items()]
    return [
        "megatron_slm.score",
        *("--checkpoint", str(folder_of(model, folder))),
        *("--corpus", str(corpus_prefix(corpus, folder))),
        *("--output", str(folder_of(stage, folder))),
        *(word for pair in words for word in pair),
    ]


def _as_word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
