"""P.model, P.vocab and P.manifest.json of a trained vocabulary.

They are written here, and recognised when the same command is run again.
"""

from __future__ import annotations

import argparse
import json
import os
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_tools.reading.documents import InputDataError
from megatron_slm import __version__
from megatron_slm.files.atomic import sync_path, write_json_atomically
from megatron_slm.files.hashing import file_sha256
from megatron_slm.files.made_from import ChangedFile, refuse_other_origin
from megatron_slm.tokenization import Tokenizer, load_tokenizer
from tokenizer.round_trip import AWKWARD_TEXTS, round_trip_failures
from tokenizer.sample import Sample, made_from


def finished_before(arguments: argparse.Namespace) -> Tokenizer | None:
    """The vocabulary under the output prefix, which an earlier run of the same command has made.

    None when there is none. Raises ValueError when it was made from something else, or has changed
    since.
    """
    path = Path(f"{arguments.output_prefix}.model")
    if arguments.overwrite or not path.exists():
        return None
    advice = "Give --overwrite to replace it, or another --output-prefix."
    try:
        manifest = json.loads(Path(f"{arguments.output_prefix}.manifest.json").read_text("utf-8"))
        before = manifest["options"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    refuse_other_origin(path, before, made_from(arguments), advice)
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != manifest["fingerprint"]:
        raise ChangedFile(f"{path} has changed since it was made. {advice}")
    return tokenizer


def publish(arguments: argparse.Namespace, model: bytes, sample: Sample) -> Tokenizer:
    """Write the model under a temporary name, prove the round trip, then move it to its own name.

    The model comes last: where it exists, the vocabulary is complete.
    """
    prefix = arguments.output_prefix
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{prefix}.model.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(model)
            stream.flush()
            os.fsync(stream.fileno())
        tokenizer = load_tokenizer(temporary)
        failures = round_trip_failures(tokenizer, AWKWARD_TEXTS)
        lossless = arguments.byte_fallback and arguments.normalization == "identity"
        if failures and lossless:
            raise InputDataError(
                f"the vocabulary does not give these texts back: {failures}; it was not written"
            )
        _write_vocabulary(Path(f"{prefix}.vocab"), tokenizer)
        write_json_atomically(
            f"{prefix}.manifest.json", manifest_of(arguments, tokenizer, sample, failures)
        )
        os.replace(temporary, f"{prefix}.model")
        sync_path(Path(prefix).parent)
    finally:
        temporary.unlink(missing_ok=True)
    return load_tokenizer(f"{prefix}.model")


def _write_vocabulary(path: Path, tokenizer: Tokenizer) -> None:
    processor = tokenizer.backend
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        for token_id in range(tokenizer.vocabulary_size):
            stream.write(f"{processor.id_to_piece(token_id)}\t{processor.get_score(token_id):g}\n")


def manifest_of(
    arguments: argparse.Namespace, tokenizer: Tokenizer, sample: Sample, failures: list[str]
) -> dict[str, Any]:
    return {
        "format_version": 1,
        "fingerprint": tokenizer.fingerprint,
        "kind": tokenizer.kind,
        "vocabulary_size": tokenizer.vocabulary_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "unk_id": tokenizer.unk_id,
        "sample": {
            "documents": sample.documents,
            "documents_seen": sample.documents_seen,
            "bytes": sample.bytes,
            "sha256": sample.sha256.hexdigest(),
            "rejected": dict(sample.rejects),
        },
        "options": sample.made_from,
        "vocab_sha256": file_sha256(f"{arguments.output_prefix}.vocab"),
        "round_trip_failures": failures,
        "created_by": {
            "program": "tokenizer.train",
            "version": __version__,
            "sentencepiece": version("sentencepiece"),
        },
    }
