"""Checkpoints into which a stranger has put an object that makes a folder when it is unpickled.

As a program, `python planted.py FOLDER`: every program that reads checkpoints, on checkpoints with
such an object in every place that was once unpickled; one JSON line per reading with its exit code
and what it said. All in one process: megatron-core's import takes longer than all of them.
"""

import contextlib
import hashlib
import io
import json
import os
import pickle
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from megatron_slm.testing.corpora import write_corpus

LENGTH = 16
VOCABULARY = 64
READERS = ("resume", "initialize_from", "online reference", "score", "export")
READ_BY = {
    ".metadata": READERS,
    "common.pt": READERS[:4],
    "random": ("resume",),
    "extra state": ("initialize_from", "online reference"),
    "tensor": ("resume", "export"),
    "checksums.json": READERS,
    "nowhere": READERS,
}
"""Places for the object, and who reads them. checksums.json takes none: it leads to a file without
end instead.

The last is for comparison: the checkpoint as it was.
"""
OUTSIDE = "/dev/zero"


class Planted:
    """Code of a stranger: a folder that is there was made by it."""

    def __init__(self, marker: Path):
        self.marker = str(marker)

    def __reduce__(self):
        return os.mkdir, (self.marker,)


def plant(checkpoint: Path, place: str, marker: Path) -> str:
    """Put a Planted into one place of a checkpoint folder and make its checksums right again;
    returns the file it is in.
    """
    planted = Planted(marker)
    metadata = pickle.loads((checkpoint / ".metadata").read_bytes())
    if place == ".metadata":
        metadata.planner_data = planted
        changed = ".metadata"
    elif place == "checksums.json":
        changed = place
    elif place == "common.pt":
        torch.save({"planted": planted}, checkpoint / place)
        changed = place
    else:
        changed = _plant_in_weights(checkpoint, metadata, place, planted)
    (checkpoint / ".metadata").write_bytes(pickle.dumps(metadata))
    checksums = json.loads((checkpoint / "checksums.json").read_text())
    for name in checksums:
        checksums[name] = hashlib.sha256((checkpoint / name).read_bytes()).hexdigest()
    if place == "checksums.json":
        checksums[OUTSIDE] = "0" * 64
    (checkpoint / "checksums.json").write_text(json.dumps(checksums))
    return changed


def _plant_in_weights(checkpoint: Path, metadata, place: str, planted: Planted) -> str:
    """Append an entry to the file that holds the place, and let .metadata lead there instead."""
    part = {"random": "random/", "extra state": "_extra_state/", "tensor": "word_embeddings"}[place]
    index = next(index for index in metadata.storage_data if part in index.fqn)
    stored = metadata.storage_data[index]
    content = io.BytesIO()
    # As long as what it replaces: an entry shorter than its tensor is refused unopened.
    torch.save([planted, torch.zeros(stored.length, dtype=torch.uint8)], content)
    path = checkpoint / stored.relative_path
    held = path.read_bytes()
    path.write_bytes(held + content.getvalue())
    stored.offset = len(held)
    stored.length = len(content.getvalue())
    return stored.relative_path


def word_tokenizer(path: Path) -> str:
    """A Hugging Face tokenizer of made-up words; its fingerprint.

    Corpora are made as ids, so only its identity and size matter.
    """
    from tokenizers import Tokenizer, models

    from megatron_slm.tokenization import load_tokenizer

    words = ["</s>", "<unk>", *(f"w{i}" for i in range(2, VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.save(str(path))
    return load_tokenizer(path).fingerprint


def readers(folder: Path) -> dict[str, Callable[[Path], int]]:
    """name -> the program, started on a run folder; its exit code."""
    from megatron_slm import export_hf, score, train

    settings = {
        "--model.layers": 1,
        "--model.hidden_size": 16,
        "--model.ffn_hidden_size": 16,
        "--model.attention_heads": 2,
        "--data.tokenizer": folder / "tokenizer.json",
        "--data.train": f"[{folder}/corpus]",
        "--data.sequence_length": LENGTH,
        "--data.global_batch_size": 2,
        "--data.micro_batch_size": 2,
        "--schedule.train_steps": 1,
        "--monitoring.wandb.mode": "disabled",
    }

    def start(run: Path, **more: str) -> int:
        options = {**settings, "--run.folder": run, **more}
        return train.main([str(word) for pair in options.items() for word in pair])

    return {
        "resume": start,
        "initialize_from": lambda run: start(
            run.with_name("new"), **{"--checkpoint.initialize_from": run}
        ),
        "online reference": lambda run: start(
            run.with_name("new"),
            **{
                "--selection.scorer": "excess_loss",
                "--selection.reference.checkpoint": run,
            },
        ),
        "score": lambda run: score.main(
            ["--checkpoint", str(run), "--corpus", f"{folder}/corpus", "--output", f"{run}_scores"]
        ),
        "export": lambda run: export_hf.main(
            ["--checkpoint", str(run), "--output", f"{run}_exported"]
        ),
    }


def read_everywhere(folder: Path) -> None:
    fingerprint = word_tokenizer(folder / "tokenizer.json")
    documents = [np.random.RandomState(n).randint(2, VOCABULARY, LENGTH) for n in range(9)]
    write_corpus(
        folder / "corpus",
        documents,
        vocabulary_size=VOCABULARY,
        tokenizer_fingerprint=fingerprint,
    )
    programs = readers(folder)
    programs["resume"](folder / "run")
    for place, names in READ_BY.items():
        for reader in names:
            here = folder / f"{place} {reader}"
            run = shutil.copytree(folder / "run", here / "run")
            changed = ""
            if place != "nowhere":
                checkpoint = run / "checkpoints" / "step_00000001"
                changed = plant(checkpoint, place, here / "its code ran")
            with (
                open(here / "said", "w") as said,
                open(here / "told", "w") as told,
                contextlib.redirect_stderr(said),
                contextlib.redirect_stdout(told),
            ):
                code = programs[reader](run)
            result = {"place": place, "reader": reader, "code": code, "file": changed}
            result["said"], result["ran"] = (
                (here / "said").read_text(),
                (here / "its code ran").exists(),
            )
            print(json.dumps(result))


if __name__ == "__main__":
    read_everywhere(Path(sys.argv[1]))
