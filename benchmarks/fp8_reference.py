"""How much of the selection an fp8 reference would change, with emulated fp8 products.

    python -m benchmarks.fp8_reference --reference runs/reference --model runs/base \\
        --corpus data/corpus --windows 64

The same measurement as `python -m megatron_slm.score --device.fp8 hybrid --fp8_model ...` makes
before it scores (megatron_slm/scoring/fp8_change.py), on a machine without fp8 products: operands
of the layers' products are rounded to e4m3 with one scale per tensor, and multiplied in fp32
(megatron_slm/testing/emulated_fp8.py). It shows the rounding, not the accumulation of fp8 tensor
cores, and no speed. Prints one JSON line. CPU only.
"""

import argparse
import json
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

from megatron_slm.config.load import ConfigError
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring.options import ScoreDevice, ScoreOptions, ScoringJob, prepare
from megatron_slm.testing.spawn import run_on_cpu


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="slm_fp8_") as folder:
        try:
            job = prepare(
                ScoreOptions(
                    checkpoint=options.reference,
                    corpus=options.corpus,
                    output=f"{folder}/scores",
                    device=ScoreDevice(fp8="hybrid", precision="bf16"),
                    fp8_model=options.model,
                    fp8_windows=options.windows,
                    fp8_keep_fraction=options.k,
                ),
                1,
                [],
            )
        except (ConfigError, ValueError) as error:
            print(f"fp8_reference: {error}", file=sys.stderr)
            return 2
        run_on_cpu(measure_emulated, job)
        found = json.loads(Path(folder, "scores", "fp8_change.json").read_text())
    print(json.dumps({"benchmark": "fp8_reference", "fp8": "emulated e4m3"} | found), flush=True)
    return 0


def measure_emulated(groups, job: ScoringJob) -> None:
    """What a scoring run in fp8 does first, with emulated products in the place of fp8 ones."""
    from megatron_slm.scoring import fp8_reference
    from megatron_slm.scoring.corpus import TokenStream
    from megatron_slm.testing.emulated_fp8 import emulate_fp8_products

    load = fp8_reference.load_scoring_model

    def load_or_emulate(reference, config, groups):
        if config.device.fp8 == "none":
            return load(reference, config, groups)
        device = replace(config.device, fp8="none", precision="fp32")
        return emulate_fp8_products(load(reference, replace(config, device=device), groups))

    fp8_reference.load_scoring_model = load_or_emulate
    store = ScoreStore.create(job.options.output, job.manifest)
    stream = TokenStream(job.options.corpus)
    plan = stream.plan(job.manifest)
    fp8_reference.state_fp8_change(job, job.fp8_model, store, groups, stream, plan)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.fp8_reference",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--reference", required=True, help="checkpoint of the reference")
    parser.add_argument("--model", required=True, help="checkpoint of the model to be trained")
    parser.add_argument("--corpus", required=True, help="prefix of the corpus")
    parser.add_argument("--windows", type=int, default=64)
    parser.add_argument("--k", type=float, default=0.6, help="kept fraction of the tokens")
    return parser


if __name__ == "__main__":
    sys.exit(main())
