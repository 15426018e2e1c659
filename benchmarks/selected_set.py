"""How exact a selection is: the set that each head's losses choose, beside that of fp64 logits.

    python -m benchmarks.selected_set                     # G11: trains a small model first
    python -m benchmarks.selected_set --device cpu        # a smaller one, minutes on 2 cores
    python -m benchmarks.selected_set --model runs/slm --reference runs/reference \\
        --corpus data/corpus --tokens 1e6                 # checkpoints of one's own

A model and its reference go over text that neither was trained on. Their last hidden states and
their heads' weights are rounded to bf16, as bf16 training has them, and the same operands are given
to three heads:

exact   fp64 logits and losses
ours    linear_cross_entropy: exact products summed in fp32
peer    megatron-core's: the logits are rounded to bf16, the loss is computed from them in fp32

The excess loss of each (both losses by the same head) selects the top share, with ours and the peer
by select_top; `differs` is the share of the exact set that the other leaves out. So the figure is
about the head's arithmetic alone: not about bf16 in the layers below, nor about stored scores
(C17: python -m benchmarks.loader --part quantize).

Without checkpoints the models are small and trained for minutes; their logits are smaller than
those of a large trained model, and rounding moves fewer tokens then. The row names the models,
their mean losses and their largest logit. One JSON line; exit code 1 when the gate is missed by
more than 3 %. The gates are defined at the head of benchmarks/RESULTS.md.
"""

import argparse
import ast
import json
import sys
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.head_peers import megatron_cross_entropy
from benchmarks.measure import GATE_SLACK, device_name
from benchmarks.model_pair import Pair, Shape, checkpoint_pair, operands_of_head, trained_pair
from megatron_slm.config.schema import ParallelConfig
from megatron_slm.device import choose_device
from megatron_slm.ops import linear_cross_entropy
from megatron_slm.parallel import join_job, leave_job
from megatron_slm.selection import excess_loss, select_top
from megatron_slm.selection.select import kept_tokens

SHAPES = {
    "cuda": Shape(
        layers=6,
        hidden=768,
        vocabulary=32_000,
        sequence_tokens=512,
        sequences=16,
        steps=150,
        text_tokens=3_000_000,
        measured_tokens=262_144,
    ),
    "cpu": Shape(
        layers=4,
        hidden=256,
        vocabulary=8_000,
        sequence_tokens=256,
        sequences=8,
        steps=200,
        text_tokens=2_000_000,
        measured_tokens=65_536,
    ),
}
"""By default, by device."""


@dataclass(frozen=True)
class Case:
    """The largest share of the exact set that may be missing from ours."""

    name: str
    gate: float


CASES = {case.name: case for case in (Case("G11", gate=0.001),)}


@dataclass(frozen=True)
class Losses:
    """Of one model's tokens [N] by each head, in nats; fp64 for the exact one, else fp32."""

    exact_N: Tensor
    ours_N: Tensor
    peer_N: Tensor
    largest_logit: float
    """Its magnitude."""


def main(argv: list[str] | None = None) -> int:
    options = _parser().parse_args(argv)
    if problem := _problem(options):
        print(f"selected_set: {problem}", file=sys.stderr)
        return 2
    device = choose_device(options.device or "auto")
    groups = join_job(ParallelConfig(), device, seed=1)
    try:
        if options.model:
            tokens = options.tokens or SHAPES[device.kind].measured_tokens
            pair = checkpoint_pair(options.model, options.reference, options.corpus, tokens, groups)
        else:
            pair = trained_pair(_shape(options, device.kind), groups)
        row = measured(CASES["G11"], pair, options.k)
    except ValueError as error:
        print(f"selected_set: {error}", file=sys.stderr)
        return 2
    finally:
        leave_job()
    print(json.dumps(row), flush=True)
    return 1 if row["missed"] else 0


def measured(case: Case, pair: Pair, keep_fraction: float) -> dict:
    """The row of a case."""
    model, reference = (head_losses(each, pair) for each in (pair.model, pair.reference))
    exact_N = exact_choice(model.exact_N - reference.exact_N, keep_fraction)
    ours_N = _choice(model.ours_N, reference.ours_N, keep_fraction)
    peer_N = _choice(model.peer_N, reference.peer_N, keep_fraction)
    ours_differs, peer_differs = (differs(exact_N, mask_N) for mask_N in (ours_N, peer_N))
    ours_rms = _rms(model.ours_N - model.exact_N)
    peer_rms = _rms(model.peer_N - model.exact_N)
    # A head that rounds its logits must be told apart, whatever the selection makes of it.
    correct = ours_rms <= peer_rms / 5
    return {
        "case": case.name,
        "measure": "accuracy",
        "models": pair.description,
        "tokens": exact_N.numel(),
        "hidden": pair.model.config.hidden_size,
        "vocabulary": pair.model.vocabulary_size,
        "k": keep_fraction,
        "device": device_name(exact_N.device),
        "torch": torch.__version__,
        "model_loss_nats": round(model.exact_N.mean().item(), 3),
        "reference_loss_nats": round(reference.exact_N.mean().item(), 3),
        "excess_deviation_nats": round((model.exact_N - reference.exact_N).std().item(), 3),
        "largest_logit": round(max(model.largest_logit, reference.largest_logit), 1),
        "ours_loss_rms_nats": float(f"{ours_rms:.2e}"),
        "peer_loss_rms_nats": float(f"{peer_rms:.2e}"),
        "ours_differs_fraction": float(f"{ours_differs:.3g}"),
        "peer_differs_fraction": float(f"{peer_differs:.3g}"),
        "peer": "megatron",
        "gate": case.gate,
        "correct": correct,
        "missed": not correct or ours_differs > case.gate * GATE_SLACK,
    }


@torch.no_grad()
def head_losses(model: torch.nn.Module, pair: Pair) -> Losses:
    """Every window of the pair by each head."""
    parts: dict[str, list[Tensor]] = {"exact_N": [], "ours_N": [], "peer_N": []}
    largest = 0.0
    for batch_BS in pair.windows_WS.split(pair.batch_windows):
        hidden_NH, weight_VH, target_N = operands_of_head(model, batch_BS)
        logits_NV = hidden_NH.double() @ weight_VH.double().t()
        largest = max(largest, logits_NV.abs().max().item())
        parts["exact_N"].append(F.cross_entropy(logits_NV, target_N, reduction="none"))
        parts["ours_N"].append(linear_cross_entropy(hidden_NH, weight_VH, target_N))
        parts["peer_N"].append(megatron_losses(hidden_NH, weight_VH, target_N))
    return Losses(
        **{name: torch.cat(values) for name, values in parts.items()}, largest_logit=largest
    )


def megatron_losses(hidden_NH: Tensor, weight_VH: Tensor, target_N: Tensor) -> Tensor:
    """fp32 [N] of megatron-core's loss; its output layer gives logits in the operands' dtype."""
    logits_NV = hidden_NH @ weight_VH.t()
    return megatron_cross_entropy(False)(logits_NV[:, None], target_N[:, None])[:, 0]


def exact_choice(excess_N: Tensor, keep_fraction: float) -> Tensor:
    """The top share by a sort of fp64 values: bool [N]."""
    kept = kept_tokens(keep_fraction, excess_N.numel())
    mask_N = torch.zeros_like(excess_N, dtype=torch.bool)
    mask_N[excess_N.argsort(descending=True, stable=True)[:kept]] = True
    return mask_N


def differs(exact_N: Tensor, other_N: Tensor) -> float:
    """The share of the exact set that the other set, which is as large, leaves out."""
    return ((exact_N & ~other_N).sum() / exact_N.sum()).item()


def _choice(loss_N: Tensor, reference_N: Tensor, keep_fraction: float) -> Tensor:
    """As training chooses."""
    eligible_N = torch.ones_like(loss_N, dtype=torch.bool)
    return select_top(excess_loss(loss_N, reference_N), eligible_N, keep_fraction).mask


def _rms(difference_N: Tensor) -> float:
    return difference_N.double().square().mean().sqrt().item()


def _problem(options: argparse.Namespace) -> str:
    """Why these options cannot be measured; "" = they can."""
    if unknown := [name for name in options.case.split(",") if name not in CASES]:
        return f"--case: got {unknown[0]!r}; expected {', '.join(CASES)}"
    if not 0 < options.k <= 1:
        return f"--k: got {options.k}; expected above 0 and at most 1"
    given = [bool(each) for each in (options.model, options.reference, options.corpus)]
    if any(given) and not all(given):
        return "--model, --reference and --corpus: got some of them; expected all three, or none"
    return ""


def _shape(options: argparse.Namespace, kind: str) -> Shape:
    changes = {
        "layers": options.layers,
        "hidden": options.hidden,
        "vocabulary": options.vocab,
        "sequence_tokens": options.seq,
        "sequences": options.mbs,
        "steps": options.steps,
        "measured_tokens": options.tokens,
    }
    changes = {name: value for name, value in changes.items() if value is not None}
    return replace(SHAPES[kind], **changes)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.selected_set",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--case", default="G11", help="G11, the only one")
    parser.add_argument("--model", help="checkpoint of the model to be trained")
    parser.add_argument("--reference", help="checkpoint of its reference")
    parser.add_argument("--corpus", help="prefix of a corpus, with --model and --reference")
    parser.add_argument(
        "--tokens",
        type=lambda text: int(ast.literal_eval(text)),
        help="tokens to measure on; default 262,144 on a GPU and 65,536 on a CPU",
    )
    parser.add_argument("--k", type=float, default=0.6, help="kept fraction of the tokens")
    parser.add_argument("--device", choices=["cpu", "cuda"])
    small = parser.add_argument_group("of the model that is trained where no checkpoint is given")
    small.add_argument("--layers", type=int)
    small.add_argument("--hidden", type=int, help="hidden size")
    small.add_argument("--vocab", type=int, help="vocabulary size")
    small.add_argument("--seq", type=int, help="tokens of a window")
    small.add_argument("--mbs", type=int, help="windows of a step")
    small.add_argument("--steps", type=int, help="of the model, and again of the reference")
    return parser


if __name__ == "__main__":
    sys.exit(main())
