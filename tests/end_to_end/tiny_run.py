"""Training runs of seconds, through the program that a user runs, on text that is made as token ids
of a tokenizer of 64 words.
"""

import json
from pathlib import Path

from tests.end_to_end.warm_programs import run_program

LENGTH = 32
VOCABULARY = 64
SEQUENCES = 8
"""Of a step: two micro-batches of the default size."""


def word_tokenizer(path: Path) -> None:
    """A Hugging Face tokenizer of 64 words; the text is made as ids, so only its identity and size
    matter.
    """
    from tokenizers import Tokenizer, models

    words = ["</s>", "<unk>", *(f"w{i}" for i in range(2, VOCABULARY))]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.add_special_tokens(["</s>", "<unk>"])
    tokenizer.save(str(path))


def train(folder: Path, name: str, **settings) -> None:
    """Train run FOLDER/NAME on FOLDER/corpus with FOLDER/tokenizer.json."""
    options = {
        "model.layers": 2,
        "model.hidden_size": 32,
        "model.ffn_hidden_size": 64,
        "model.query_groups": 2,
        "model.initialization_std": 0.2,
        "data.tokenizer": folder / "tokenizer.json",
        "data.train": f"[{folder}/corpus]",
        "data.sequence_length": LENGTH,
        "data.global_batch_size": SEQUENCES,
        "monitoring.log_interval_steps": 1,
        "monitoring.wandb.mode": "disabled",
        "checkpoint.save_optimizer": "false",
        "run.folder": folder / name,
        **settings,
    }
    words = [(f"--{option}", value) for option, value in options.items()]
    run_program("megatron_slm.train", *(word for pair in words for word in pair))


def train_records(folder: Path, name: str) -> list[dict]:
    """The metrics of every step of run FOLDER/NAME."""
    lines = map(json.loads, (folder / name / "metrics.jsonl").read_text().splitlines())
    return [line for line in lines if line["kind"] == "train"]
