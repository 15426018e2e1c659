"""Run lm-evaluation-harness on a checkpoint, without an export.

    python -m megatron_slm.harness --model megatron_slm \\
        --model_args checkpoint=runs/slm --batch_size 16 --tasks slm_math

Starts the harness (pip install lm_eval) with one more model, megatron_slm, and the paper's task
lists as the groups slm_math, slm_math_paper, slm_general and slm_code; every other option is the
harness' own: python -m lm_eval run --help. Where --include_path is given, it replaces our lists.

model_args: checkpoint=RUN, and if wanted
  tokenizer=PATH    the checkpoint's tokenizer, where its file has moved
  max_length=N      tokens that are read at once (default: the length of training)
  precision=bf16    fp32, bf16 or fp16 (default: as it was trained)
  tensor=N, pipeline=N, context=N, expert=N, expert_tensor=N
                    the layout under torchrun; the other processes are data-parallel
  add_bos_token=true, prefix_token_id=N, max_gen_toks=N, device=cpu

Exit codes: 0 done, 2 bad usage, 3 a checkpoint, tokenizer or task's file that cannot be used.
See docs/evaluation.md.
"""

import os
import sys
from importlib.util import find_spec
from pathlib import Path

from megatron_slm import __version__
from megatron_slm.config.load import ConfigError
from megatron_slm.installation import require, says_missing_extra

TASKS = Path(__file__).parent / "evaluation" / "tasks"
NO_DOCUMENTS = "did not find any docs"
"""What lm_eval says where a process has nothing to do for a task."""


@says_missing_extra("harness")
def main(argv: list[str] | None = None) -> int:
    """Register the model, and hand over to the harness; returns the exit code."""
    words = list(sys.argv[1:] if argv is None else argv)
    if not words or words[0] in ("-h", "--help"):
        print(f"usage: slm-harness [options of lm_eval] [--version]\n\n{__doc__}", end="")
        return 0
    if words[0] == "--version":
        print(f"slm-harness {__version__}")
        return 0
    if find_spec("lm_eval") is None:
        print(
            "harness: lm-evaluation-harness is not installed; pip install lm_eval", file=sys.stderr
        )
        return 2
    require("torch", "megatron")
    try:
        return evaluate(words)
    except ConfigError as error:
        print(f"harness: {error}", file=sys.stderr)
        return 2
    except (ValueError, FileNotFoundError) as error:
        hint = ""
        if NO_DOCUMENTS in str(error) and int(os.environ.get("WORLD_SIZE", 1)) > 1:
            hint = (
                " A task needs a document for each data-parallel process: start fewer processes, "
                "or raise --limit."
            )
        print(f"harness: {error}{hint}", file=sys.stderr)
        return 3


def evaluate(words: list[str]) -> int:
    """Run the harness' own command line with our model and our task lists."""
    from lm_eval.__main__ import cli_evaluate

    import megatron_slm.evaluation.harness  # noqa: F401 (registers the model)
    from megatron_slm.parallel import leave_job

    if not any(word.partition("=")[0] == "--include_path" for word in words):
        words = [*words, "--include_path", str(TASKS)]
    before = sys.argv
    sys.argv = ["lm_eval", *words]
    try:
        cli_evaluate()
    finally:
        sys.argv = before
        leave_job()
    return 0


if __name__ == "__main__":
    sys.exit(main())
