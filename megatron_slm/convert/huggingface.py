"""Hugging Face folders: config.json, safetensors and tokenizer, out of and into our tensors.

config.json itself is handled in hf_config.py.
"""

import os
import shutil
from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor

from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    complete,
    describe_model,
    writing_folder,
)
from megatron_slm.convert.beside_tokenizer import read_beside
from megatron_slm.convert.families.registry import family_for, family_of
from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.hf_config import huggingface_config, special_ids
from megatron_slm.convert.hf_tokenizer import write_tokenizer
from megatron_slm.convert.model_folder import (
    CARD,
    LAST_FILE,
    MADE_FROM,
    ModelFolder,
    check_output,
    made_from_note,
)
from megatron_slm.convert.names import FromHuggingface, check_names, to_huggingface
from megatron_slm.convert.safetensors_folder import (
    LARGEST_SHARD_BYTES,
    SafetensorsFolder,
    write_safetensors,
)
from megatron_slm.convert.stored_state import write_full_state
from megatron_slm.convert.tensors import our_tensors
from megatron_slm.files.atomic import sync_path, write_json
from megatron_slm.files.hashing import file_sha256
from megatron_slm.tokenization import Tokenizer

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def export(
    state: Mapping[str, Tensor],
    info: CheckpointInfo,
    tokenizer: Tokenizer | None,
    output: str | Path,
    *,
    dtype: str = "fp32",
    model_type: str = "",
    overwrite: bool = False,
    largest_shard_bytes: int = LARGEST_SHARD_BYTES,
    made_from: dict | None = None,
    card: str = "",
) -> Path:
    """Write `state` (whole tensors under our names, read one at a time) as a Hugging Face model
    folder `output`.

    Everything is written beside `output` and renamed, so `output` is either absent, what it was, or
    complete. tokenizer=None leaves the tokenizer out. model_type: the family that the model is
    written as; "" = the first that can express it. made_from: kept beside the model, so that a
    second run knows that it is one. card: the text of README.md, if any. ValueError when `output`
    holds something and `overwrite` is off, or is on but `output` is not an export.
    """
    output = Path(os.path.abspath(output))
    check_output(output, overwrite)
    model = info.model_config()
    geometry = Geometry.from_model(model)
    beside = read_beside(tokenizer) if tokenizer is not None else None
    end_ids = beside.end_ids if beside else ()
    family = family_for(model, model_type)
    config = huggingface_config(model, info.sequence_length, tokenizer, dtype, end_ids, family)
    ours = {tensor.name for tensor in our_tensors(geometry)}
    check_names(set(state), ours, "the checkpoint")
    generation = {"do_sample": False, "_from_model_config": True}
    if beside and beside.generation:
        generation = beside.generation
    ids = special_ids(tokenizer, end_ids)
    generation |= {name: token_id for name, token_id in ids.items() if token_id is not None}
    writing = output.with_name(f".writing_{output.name}")
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    try:
        if tokenizer is not None:
            begin = info.tokenizer.get("prepend_bos")
            write_tokenizer(tokenizer, writing, info.sequence_length, prepend_bos=begin)
        tensors = (
            (name, _rounded(name, tensor, dtype))
            for name, tensor in to_huggingface(state, geometry, family)
        )
        write_safetensors(tensors, writing, largest_shard_bytes)
        write_json(writing / "generation_config.json", generation)
        if card:
            (writing / CARD).write_text(card, encoding="utf-8")
        write_json(writing / MADE_FROM, made_from_note(writing, made_from or {}))
        write_json(writing / LAST_FILE, config)
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    _replace(writing, output)
    return output


def _rounded(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """`tensor` in the precision that was asked for. ValueError: a value is too large for it."""
    rounded = tensor.to(DTYPES[dtype])
    if dtype == "fp16" and not rounded.isfinite().all() and tensor.isfinite().all():
        raise ValueError(
            f"{name} has values up to {tensor.abs().max().item():g}, above fp16's largest number "
            f"{torch.finfo(torch.float16).max:g}; export with --dtype bf16 or fp32"
        )
    return rounded


def _replace(writing: Path, output: Path) -> None:
    """Rename into place; an earlier export is removed only after the new one stands."""
    for path in writing.rglob("*"):
        sync_path(path)
    sync_path(writing)
    old = output.with_name(f".replaced_{output.name}")
    shutil.rmtree(old, ignore_errors=True)
    if output.exists():
        output.rename(old)
    writing.rename(output)
    sync_path(output.parent)
    shutil.rmtree(old, ignore_errors=True)


def import_model(source: ModelFolder, checkpoints: Path, dtype: str) -> Path:
    """Write the model of `source` as the step-0 checkpoint in `checkpoints`; returns its folder.

    ValueError: the tensors are not those that config.json describes.
    """
    geometry = Geometry.from_model(source.model)
    theirs = SafetensorsFolder(source.folder)
    try:
        state = FromHuggingface(theirs, geometry, family_of(source.model_type), theirs.shapes)
    except ValueError as error:
        raise ValueError(f"{source.folder}: {error}") from None
    info = CheckpointInfo(
        model=describe_model(source.model, source.model.vocabulary_size),
        sequence_length=source.sequence_length,
        tokenizer={**source.tokenizer.entry, "prepend_bos": source.prepend_bos},
        step=0,
        tokens_processed=0,
        precision=dtype,
        extra={"imported_from": str(source.folder), "made_from": source.made_from(dtype)},
    )
    writing = writing_folder(checkpoints, 0)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    shapes = {name: entry.shape for name, entry in state.entries.items()}
    try:
        write_full_state(state, shapes, geometry.layers, writing, DTYPES[dtype])
        checksums = {path.name: file_sha256(path) for path in writing.iterdir()}
    except BaseException:
        shutil.rmtree(writing, ignore_errors=True)
        raise
    trainer_state = {"layout": {}, "adam_steps": 0, "weights_only": True}
    return complete(checkpoints, 0, info, trainer_state, checksums)
