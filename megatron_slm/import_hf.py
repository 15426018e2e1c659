"""Read a Hugging Face model into a checkpoint that training starts from; see docs/conversion.md."""

import argparse
import shutil
import sys
from pathlib import Path

from megatron_slm.checkpoint import folder as folders
from megatron_slm.config.arguments import Program
from megatron_slm.files.export_note import read_export_note
from megatron_slm.files.hashing import file_sha256
from megatron_slm.files.made_from import refuse_other_origin
from megatron_slm.tokenization import load_tokenizer

DESCRIPTION = """Turn a Hugging Face folder (Llama, Mistral, Mixtral, Qwen2, Qwen3, Qwen3-MoE; safetensors) into a weights checkpoint of ours.

Start from it with --checkpoint.initialize_from OUTPUT, in any parallel layout. The folder's tokenizer is recorded in the checkpoint and
must be the one the corpora are made with. One process, no GPU; tensors pass through memory one at a time."""
EXAMPLE = """example:
  hf download TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --local-dir models/tinyllama
  python -m megatron_slm.import_hf --input models/tinyllama --output runs/tinyllama_base
  torchrun --nproc-per-node 8 -m megatron_slm.train --config launch/recipes/tinyllama_1.1b_math_slm.yaml

exit codes: 0 done, 2 bad usage, 3 a model or tokenizer that cannot be read here"""


def build_parser() -> Program:
    parser = Program(
        "import_hf",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", required=True, help="Hugging Face folder: config.json, safetensors, tokenizer"
    )
    parser.add_argument(
        "--output",
        required=True,
        help="run folder to make; the weights become its checkpoint of step 0",
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16"),
        default="fp32",
        help="precision of the stored weights (default: fp32)",
    )
    parser.add_argument(
        "--tokenizer", default="", help="tokenizer file, when it is not in the input folder"
    )
    return parser


def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    checkpoints = Path(options.output) / "checkpoints"
    try:
        if folders.complete_checkpoints(checkpoints):
            return _imported_before(options, checkpoints)
        folder = import_folder(Path(options.input), checkpoints, options.dtype, options.tokenizer)
    except ValueError as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return 3
    print(
        f"imported {options.input} to {folder}; start from it with --checkpoint.initialize_from "
        f"{options.output}"
    )
    if _begins_texts(folders.read_checkpoint_info(folder).tokenizer):
        print(
            "its tokenizer begins every text with a begin-of-text token: to go on as the model was "
            "trained, make the corpora with --prepend-bos"
        )
    return 0


def _imported_before(options: argparse.Namespace, checkpoints: Path) -> int:
    """Exit code for a run folder that has checkpoints: 0 when step 0 is this very import, 2 when it
    is not.
    """
    imported = folders.step_folder(checkpoints, 0)
    before = None
    if imported in folders.complete_checkpoints(checkpoints):
        before = folders.read_checkpoint_info(imported).extra.get("made_from")
    try:
        now = _made_from(Path(options.input), options.dtype, options.tokenizer)
        refuse_other_origin(imported, before, now, "Give another --output.")
    except (ValueError, OSError) as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return 2
    print(f"{imported}: done before, from {options.input}")
    return 0


def _made_from(source: Path, dtype: str, tokenizer_path: str) -> dict:
    from megatron_slm.convert.model_folder import files_fingerprint

    return {
        "files": files_fingerprint(source),
        "dtype": dtype,
        "tokenizer": load_tokenizer(tokenizer_path or source).fingerprint,
    }


def _begins_texts(tokenizer: dict) -> bool:
    """Whether the model's own tokenizer begins texts with a token.

    A SentencePiece file does not say so itself; the note in an export of ours does.
    """
    from megatron_slm.convert.begin_of_text import begins_texts

    if tokenizer["prepend_bos"] is None and tokenizer["kind"] == "huggingface":
        return bool(begins_texts(Path(tokenizer["path"]).read_text(encoding="utf-8")))
    return bool(tokenizer["prepend_bos"])


def import_folder(source: Path, checkpoints: Path, dtype: str, tokenizer_path: str = "") -> Path:
    """Write the model in `source` as the step-0 checkpoint in `checkpoints`; returns its folder.

    ValueError says what cannot be read.
    """
    from megatron_slm.convert.hf_config import model_config
    from megatron_slm.convert.model_folder import read_json

    model, sequence_length = model_config(read_json(source / "config.json"))
    tokenizer = load_tokenizer(tokenizer_path or source)
    if tokenizer.vocabulary_size > model.vocabulary_size:
        raise ValueError(
            f"{tokenizer.path} has {tokenizer.vocabulary_size} ids, the model's embedding only "
            f"{model.vocabulary_size}; give its own --tokenizer"
        )
    # These load torch, so they wait until the folder's own files have been read.
    from megatron_slm.convert.huggingface import DTYPES, SafetensorsFolder
    from megatron_slm.convert.names import FromHuggingface, Geometry
    from megatron_slm.convert.stored_state import write_full_state

    geometry = Geometry.from_model(model)
    state = FromHuggingface(SafetensorsFolder(source), geometry)
    note = None if tokenizer_path else read_export_note(source)
    info = folders.CheckpointInfo(
        model=folders.describe_model(model, model.vocabulary_size),
        sequence_length=sequence_length,
        tokenizer={**tokenizer.entry, "prepend_bos": note and note["prepend_bos"]},
        step=0,
        tokens_processed=0,
        precision=dtype,
        extra={
            "imported_from": str(source),
            "made_from": _made_from(source, dtype, tokenizer_path),
        },
    )
    writing = folders.writing_folder(checkpoints, 0)
    shutil.rmtree(writing, ignore_errors=True)
    writing.mkdir(parents=True)
    write_full_state(
        state,
        {name: entry.shape for name, entry in state.entries.items()},
        geometry.layers,
        writing,
        DTYPES[dtype],
    )
    checksums = {path.name: file_sha256(path) for path in writing.iterdir()}
    return folders.complete(
        checkpoints, 0, info, {"layout": {}, "adam_steps": 0, "weights_only": True}, checksums
    )


if __name__ == "__main__":
    sys.exit(main())
