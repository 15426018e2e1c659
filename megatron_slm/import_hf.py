"""Read a Hugging Face model into a checkpoint that training starts from; see docs/conversion.md."""

import argparse
import sys
from pathlib import Path

from megatron_slm.checkpoint.folder import (
    complete_checkpoints,
    read_checkpoint_info,
    step_folder,
)
from megatron_slm.config.arguments import Program
from megatron_slm.convert.families.registry import MODEL_TYPES
from megatron_slm.convert.model_folder import open_model_folder, origin_of_import
from megatron_slm.files.made_from import ChangedFile, refuse_other_origin
from megatron_slm.installation import says_missing_extra
from megatron_slm.tokenization import load_tokenizer

DESCRIPTION = f"""Turn a Hugging Face folder (safetensors; model_type
{", ".join(MODEL_TYPES)})
into a weights checkpoint of ours.

Start from it with --checkpoint.initialize_from OUTPUT, in any parallel layout. The folder's
tokenizer is recorded in the checkpoint and must be the one the corpora are made with. One process,
no GPU; tensors pass through memory one at a time."""
EXAMPLE = """example:
  hf download TinyLlama/TinyLlama-1.1B-intermediate-step-1431k-3T --local-dir models/tinyllama
  python -m megatron_slm.import_hf --input models/tinyllama --output runs/tinyllama_base
  torchrun --nproc-per-node 8 -m megatron_slm.train \\
    --config launch/recipes/tinyllama_1.1b_math_slm.yaml

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


@says_missing_extra("import_hf")
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    checkpoints = Path(options.output) / "checkpoints"
    try:
        if complete_checkpoints(checkpoints):
            return _imported_before(options, checkpoints)
        source = open_model_folder(Path(options.input), options.tokenizer)
        # This loads torch, so it waits until the folder's small files have been read.
        from megatron_slm.convert.huggingface import import_model

        folder = import_model(source, checkpoints, options.dtype)
    except (ValueError, OSError) as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return 3
    print(
        f"imported {options.input} to {folder}; start from it with --checkpoint.initialize_from "
        f"{options.output}"
    )
    if _begins_texts(read_checkpoint_info(folder).tokenizer):
        print(
            "its tokenizer begins every text with a begin-of-text token: to go on as the model was "
            "trained, make the corpora with --prepend-bos"
        )
    return 0


def _imported_before(options: argparse.Namespace, checkpoints: Path) -> int:
    """Exit code where checkpoints exist: 0 when step 0 is this very import, 2 when it is another,
    3 when the folder that it was made from has changed or cannot be read.
    """
    imported = step_folder(checkpoints, 0)
    before = None
    if imported in complete_checkpoints(checkpoints):
        before = read_checkpoint_info(imported).extra.get("made_from")
    try:
        tokenizer = load_tokenizer(options.tokenizer or options.input)
        now = origin_of_import(Path(options.input), tokenizer, options.dtype)
    except (ValueError, OSError) as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return 3
    try:
        refuse_other_origin(imported, before, now, "Give another --output.")
    except ValueError as error:
        print(f"import_hf: {error}", file=sys.stderr)
        return 3 if isinstance(error, ChangedFile) else 2
    print(f"{imported}: done before, from {options.input}")
    return 0


def _begins_texts(tokenizer: dict) -> bool:
    """Whether the model's own tokenizer begins texts with a token.

    A SentencePiece file does not say so itself; the note in an export of ours does.
    """
    from megatron_slm.convert.begin_of_text import begins_texts

    if tokenizer["prepend_bos"] is None and tokenizer["kind"] == "huggingface":
        return bool(begins_texts(Path(tokenizer["path"]).read_text(encoding="utf-8")))
    return bool(tokenizer["prepend_bos"])


if __name__ == "__main__":
    sys.exit(main())
