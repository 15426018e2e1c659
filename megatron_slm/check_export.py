"""Open a Hugging Face export with transformers and compare its logits with ours, on real text."""

import argparse
import sys
from pathlib import Path

from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Positive, Size
from megatron_slm.installation import says_missing_extra

DESCRIPTION = """Compare the logits of a checkpoint with those of its Hugging Face export.

They are compared position by position, in fp32.

Prints the largest difference; exit code 0 when it is below --tolerance, 1 when it is not, 3 when
something cannot be opened."""
EXAMPLE = """example:
  python -m megatron_slm.check_export \\
    --checkpoint runs/slm --export exports/slm --corpus data/held_out"""


def build_parser() -> Program:
    parser = Program(
        "check_export",
        description=DESCRIPTION,
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--checkpoint",
        required=True,
        help="run folder, checkpoints folder, or one step_* folder, of any layout",
    )
    parser.add_argument("--export", required=True, help="folder that export_hf wrote")
    parser.add_argument("--corpus", required=True, help="prefix of a corpus to take text from")
    parser.add_argument(
        "--sequences", type=number_in(Size), default=4, help="sequences compared (default: 4)"
    )
    parser.add_argument(
        "--tolerance",
        type=number_in(Positive),
        default=1e-3,
        help="largest allowed difference of a logit (default: 1e-3)",
    )
    return parser


@says_missing_extra("check_export")
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        difference, generated = compare_logits(options)
    except (ValueError, OSError) as error:
        print(f"check_export: {error}", file=sys.stderr)
        return 3
    verdict = "agree" if difference < options.tolerance else "DIFFER"
    print(
        f"logits {verdict}: largest difference {difference:.2e} (allowed {options.tolerance:g}); "
        f"the export continues a text with: {generated!r}"
    )
    return 0 if difference < options.tolerance else 1


def compare_logits(options) -> tuple[float, str]:
    """(largest absolute difference of a logit, a few generated words).

    ValueError names what cannot be opened.
    """
    from megatron_slm.config.schema import DeviceConfig, ParallelConfig
    from megatron_slm.convert.model_folder import read_config
    from megatron_slm.data.corpora import open_corpora
    from megatron_slm.scoring.reference import load_scoring_model, open_reference, scoring_config

    [corpus] = open_corpora([options.corpus])
    reference = open_reference(options.checkpoint, corpus.manifest)
    read_config(Path(options.export))

    # The rest loads torch, so it waits until everything has been found.
    from megatron_slm.device import choose_device

    # fp32 on the CPU: what is compared is the conversion, not the kernels
    device = choose_device("cpu")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from megatron_slm.data.scored_dataset import validation_dataset
    from megatron_slm.parallel import join_job, leave_job

    config = scoring_config(
        reference, reference.info.sequence_length, ParallelConfig(), DeviceConfig(kind="cpu")
    )
    groups = join_job(ParallelConfig(), device, seed=0, rank=0, world_size=1)
    try:
        model = load_scoring_model(reference, config, groups)[0].float()
        dataset = validation_dataset(corpus, sequence_length=reference.info.sequence_length)
        count = min(options.sequences, len(dataset))
        tokens_BS = torch.stack([torch.from_numpy(dataset[i]["tokens"]) for i in range(count)])
        position_ids_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
        exported = AutoModelForCausalLM.from_pretrained(
            options.export, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        ).eval()
        with torch.no_grad():
            ours = model(tokens_BS, position_ids_BS, None)[..., : exported.config.vocab_size]
            difference = float((ours - exported(tokens_BS).logits).abs().max())
            tokenizer = AutoTokenizer.from_pretrained(
                options.export, trust_remote_code=False, local_files_only=True
            )
            continued = exported.generate(
                tokens_BS[:1, :32],
                max_new_tokens=12,
                do_sample=False,
                attention_mask=torch.ones(1, 32),
            )
        text = tokenizer.decode(continued[0, 32:])
        assert isinstance(text, str)  # it decodes to a list where it is given several sequences
        return difference, text
    finally:
        leave_job()


if __name__ == "__main__":
    sys.exit(main())
