"""Write a trained checkpoint as a Hugging Face folder; see docs/conversion.md."""

import argparse
import os
import sys
from pathlib import Path

from megatron_slm.checkpoint.folder import (
    CheckpointInfo,
    damaged_files,
    read_checkpoint_info,
    resolve_checkpoint,
)
from megatron_slm.config.arguments import Program
from megatron_slm.convert.families.registry import MODEL_TYPES, family_for
from megatron_slm.files.hashing import file_sha256
from megatron_slm.files.made_from import ChangedFile
from megatron_slm.installation import says_missing_extra
from megatron_slm.tokenization import Tokenizer, load_tokenizer, tokenizer_differences

DESCRIPTION = """Write a checkpoint as a Hugging Face folder (config.json, safetensors, tokenizer).

Works on a checkpoint of any layout, in one process and without a GPU. The model becomes
LlamaForCausalLM, or Qwen2ForCausalLM with model.qkv_bias, or Qwen3ForCausalLM with model.qk_norm;
with model.experts, MixtralForCausalLM or (model.qk_norm) Qwen3MoeForCausalLM; with
model.attention_window_tokens, MistralForCausalLM in the place of Llama's; docs/conversion.md lists
all. --model-type chooses where several compute the same."""
EXAMPLE = """example:
  python -m megatron_slm.export_hf --checkpoint runs/slm --output exports/slm
  python -c "import transformers as t; t.AutoModelForCausalLM.from_pretrained('exports/slm')"

exit codes: 0 done, 2 bad usage, 3 bad checkpoint or tokenizer"""


def build_parser() -> Program:
    parser = Program(
        "export_hf",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run folder (its newest checkpoint), its checkpoints folder, or one step_* folder",
    )
    parser.add_argument(
        "--output",
        required=True,
        help=(
            "folder to write; it must not hold anything but this very export, unless --overwrite "
            "is given"
        ),
    )
    parser.add_argument(
        "--dtype",
        choices=("fp32", "bf16", "fp16"),
        default="fp32",
        help="precision of the exported weights (default: fp32)",
    )
    parser.add_argument(
        "--model-type",
        choices=MODEL_TYPES,
        default="",
        metavar="TYPE",
        help=(
            "write the model as this family, for example phi3 where a Llama computes the same; one "
            f"of {', '.join(MODEL_TYPES)} (default: the first of these that computes what it does)"
        ),
    )
    parser.add_argument(
        "--tokenizer",
        default="",
        help=(
            "tokenizer file, when it is no longer where the checkpoint says; none = export "
            "without one"
        ),
    )
    parser.add_argument(
        "--overwrite", action="store_true", help="replace an earlier export at --output"
    )
    return parser


@says_missing_extra("export_hf")
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    from megatron_slm.convert.beside_tokenizer import read_beside
    from megatron_slm.convert.model_folder import check_output, exported_before

    try:
        folder = resolve_checkpoint(options.checkpoint)
        info = read_checkpoint_info(folder)
        tokenizer = (
            None
            if options.tokenizer == "none"
            else tokenizer_of_checkpoint(options.tokenizer, info, folder)
        )
        beside = None if tokenizer is None else read_beside(tokenizer)
    except ValueError as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 3
    made_from = {
        "checkpoint": f"sha256:{file_sha256(folder / 'checksums.json')}",
        "step": info.step,
        "dtype": options.dtype,
        "tokenizer": tokenizer and tokenizer.fingerprint,
    }
    if options.model_type:
        made_from["model_type"] = options.model_type
    if beside is not None and beside.fingerprint:
        made_from["files"] = beside.fingerprint
    try:
        if not options.overwrite and exported_before(Path(options.output), made_from):
            print(f"{options.output}: done before, from step {info.step} of {folder}")
            return 0
        check_output(Path(options.output), options.overwrite)
    except ValueError as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 3 if isinstance(error, ChangedFile) else 2
    try:
        output = _export(folder, info, tokenizer, options, made_from)
    except (ValueError, OSError) as error:
        print(f"export_hf: {error}", file=sys.stderr)
        return 3
    print(f"exported step {info.step} of {folder} to {output}")
    if tokenizer is not None and beside is not None:
        if carried := beside.said():
            print(f"taken over from {beside.folder}: {', '.join(carried)}")
        _say_what_it_adds(tokenizer, info)
        _say_other_splits(tokenizer, output)
    return 0


def _export(
    folder: Path,
    info: CheckpointInfo,
    tokenizer: Tokenizer | None,
    options: argparse.Namespace,
    made_from: dict,
) -> Path:
    """Write the checkpoint in `folder` to options.output; ValueError when it cannot be."""
    if damaged := damaged_files(folder):
        raise ValueError(
            f"{folder}: {', '.join(damaged)} missing, no plain files, or different from what "
            "checksums.json says; use another step_* folder, or copy it again"
        )
    # These load torch, so they wait until the checkpoint and its tokenizer have been looked at.
    from megatron_slm.convert.huggingface import export
    from megatron_slm.convert.model_card import model_card
    from megatron_slm.convert.stored_state import read_full_state

    class_name = family_for(info.model_config(), options.model_type).architecture
    return export(
        read_full_state(folder),
        info,
        tokenizer,
        options.output,
        dtype=options.dtype,
        model_type=options.model_type,
        overwrite=options.overwrite,
        made_from=made_from,
        card=model_card(folder, info, Path(os.path.abspath(options.output)).name, class_name),
    )


def _say_what_it_adds(tokenizer: Tokenizer, info: CheckpointInfo) -> None:
    """Print which tokens the exported tokenizer adds to a text, or that the checkpoint does not
    record it.
    """
    from megatron_slm.convert.begin_of_text import begin_token

    prepend_bos = info.tokenizer.get("prepend_bos")
    if prepend_bos is None:
        print(
            "export_hf: warning: the checkpoint does not say whether documents begin with the "
            "begin-of-text token (its corpora differ in --prepend-bos, or it was not recorded), so "
            "what the tokenizer adds to a text was left as it was",
            file=sys.stderr,
        )
    elif prepend_bos:
        print(f"the tokenizer begins texts with {begin_token(tokenizer)[0]}, as the corpora do")
    else:
        print("the tokenizer adds no begin or end token to a text, as in the corpora")


def _say_other_splits(tokenizer: Tokenizer, output: Path) -> None:
    """Print on which texts, if any, the rewritten tokenizer.json gives other ids."""
    if tokenizer.kind != "sentencepiece":
        return  # tokenizer.json is the corpora's own
    from tokenizers import Tokenizer as FastTokenizer

    from megatron_slm.convert.hf_tokenizer import other_splits

    other, compared, first = other_splits(
        FastTokenizer.from_file(str(output / "tokenizer.json")), tokenizer
    )
    if other:
        print(
            f"export_hf: warning: on {other} of {compared} rare texts (runs of spaces, characters "
            "that normalisation changes) tokenizer.json gives other ids than preprocessing did, "
            f"for example {', '.join(map(repr, first))}; where that matters, use the "
            "tokenizer.model in the folder, which is the corpora's own",
            file=sys.stderr,
        )


def tokenizer_of_checkpoint(given: str, info: CheckpointInfo, folder: Path) -> Tokenizer:
    """The tokenizer the model was trained with: the given file or the one its model.json names.

    ValueError when it is another one.
    """
    path = given or info.tokenizer.get("path", "")
    try:
        tokenizer = load_tokenizer(path)
    except ValueError as error:
        raise ValueError(
            f"{error} (the checkpoint {folder} was trained with it; say where it is now with "
            "--tokenizer, or --tokenizer none)"
        ) from None
    if differences := tokenizer_differences(tokenizer.entry, info.tokenizer):
        raise ValueError(
            f"{path} is not the tokenizer this model was trained with; it and the checkpoint say: "
            f"{'; '.join(differences)}"
        )
    return tokenizer


if __name__ == "__main__":
    sys.exit(main())
