"""Backward that follows the selection: its time, and how far its gradient is from the exact one.

    python -m benchmarks.backward_rows time       # seconds with each selection.backward_rows
    python -m benchmarks.backward_rows quality    # cosine to the exact gradient; held-out loss

The model is a real megatron-core decoder, built from the configuration. `last_layer` is exact;
`every_layer_approximate` drops the gradient of unselected tokens at each layer's entry. The first
command times forward and backward. The second measures the cosine between the approximate and the
exact gradient layer by layer, and the held-out loss at equal steps and at equal compute: the
approximate side then goes on until it has done the floating-point operations (counted, forward and
backward) of the exact one.

Text: the Python standard library's source, one byte per token. Selection: the k tokens of highest
loss of each micro-batch. CPU time of one thread, interleaved rounds; one JSON line per result.
"""

import argparse
import json
import statistics
import sys
import sysconfig
import time
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode, sdpa_backward_flop_count, sdpa_flop_count

from benchmarks.measure import seconds_per_call
from megatron_slm.config.schema import Config, ParallelConfig
from megatron_slm.device import choose_device
from megatron_slm.parallel import join_job, leave_job

BYTES = 256
# Values of selection.backward_rows.
EXACT = "all"
LAST_LAYER = "last_layer"
APPROXIMATE = "every_layer_approximate"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.backward_rows",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("what", choices=["time", "quality"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--mbs", type=int, default=4)
    parser.add_argument("--k", type=float, nargs="+", default=[0.6, 0.4], help="kept fractions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument(
        "--steps",
        type=int,
        default=100,
        help="quality: plain steps first, then as many with each backward",
    )
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    groups = join_job(ParallelConfig(), choose_device("cpu"), seed=1)
    try:
        rows = times(options, groups) if options.what == "time" else quality(options, groups)
        for row in rows:
            print(json.dumps(row), flush=True)
    finally:
        leave_job()
    return 0


def decoder(options: argparse.Namespace, groups, backward_rows: str) -> torch.nn.Module:
    """A fresh model, the same weights every time."""
    # Imports megatron-core, which choose_device must prepare for a CPU first.
    from megatron_slm.model.build import build_model

    config = Config()
    config.model.layers = options.layers
    config.model.hidden_size = options.hidden
    config.model.ffn_hidden_size = options.hidden * 8 // 3
    config.data.sequence_length = options.seq
    config.selection.backward_rows = backward_rows
    (model,) = build_model(config, BYTES, groups)
    return model


def backward(model: torch.nn.Module, batch: torch.Tensor, keep_fraction: float) -> float:
    """Forward and backward of the selected tokens' mean loss; returns the mean of all tokens."""
    tokens_BS, labels_BS = batch[:, :-1], batch[:, 1:]
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    loss_BS = model(tokens_BS, positions_BS, None, labels=labels_BS).loss_BS
    kept = round(keep_fraction * loss_BS.numel())
    weight_BS = (
        torch.zeros(loss_BS.numel())
        .index_fill_(0, loss_BS.detach().flatten().topk(kept).indices, 1.0 / kept)
        .view_as(loss_BS)
    )
    (loss_BS * weight_BS).sum().backward()
    return loss_BS.detach().mean().item()


class Batches:
    """Windows of the standard library's source; the last tenth is held out."""

    def __init__(self, options: argparse.Namespace):
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(data) * 9 // 10
        self.train = data[:cut]
        self.held_out = data[cut:]
        self.options = options

    def take(self, seed: int, data: torch.Tensor | None = None) -> torch.Tensor:
        data = self.train if data is None else data
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(
            0, len(data) - self.options.seq - 1, (self.options.mbs,), generator=generator
        )
        return torch.stack([data[start : start + self.options.seq + 1] for start in starts])


def times(options: argparse.Namespace, groups) -> list[dict]:
    batch = Batches(options).take(0)
    kinds = (EXACT, LAST_LAYER, APPROXIMATE)
    models = {kind: decoder(options, groups, kind) for kind in kinds}
    rows = []
    for k in options.k:
        seconds = seconds_per_call(
            {kind: partial(backward, models[kind], batch, k) for kind in kinds},
            "cpu",
            options.rounds,
        )
        median = {kind: statistics.median(values) for kind, values in seconds.items()}
        row = {
            "benchmark": "backward_rows time",
            "k": k,
            "layers": options.layers,
            "hidden": options.hidden,
            "tokens": options.mbs * options.seq,
        }
        row |= {f"{kind}_median_seconds": round(value, 3) for kind, value in median.items()}
        for kind in kinds[1:]:
            row[f"{kind}_ratio"] = round(median[kind] / median[EXACT], 3)
            row[f"{kind}_ratio_of_minima"] = round(min(seconds[kind]) / min(seconds[EXACT]), 3)
            row[f"{kind}_flops_ratio"] = round(
                step_flops(models[kind], batch, k) / step_flops(models[EXACT], batch, k), 3
            )
        rows.append(row)
    return rows


def step_flops(model: torch.nn.Module, batch: torch.Tensor, keep_fraction: float) -> int:
    """Floating-point operations of the products of one forward and backward, attention included.

    They are counted while they run.
    """
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    formulas = {
        flash: _flash_flops,
        torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _flash_backward_flops,
    }
    with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
        backward(model, batch, keep_fraction)
    return counter.get_total_flops()


def _flash_flops(query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_flop_count(query, key, value)


def _flash_backward_flops(grad, query, key, value, *_, out_shape=None, **__) -> int:
    return sdpa_backward_flop_count(grad, query, key, value)


def quality(options: argparse.Namespace, groups) -> list[dict]:
    batches = Batches(options)
    rows = []
    quarters = [options.steps * quarter // 4 for quarter in range(1, 5)]
    start = decoder(options, groups, EXACT)
    train(start, batches, quarters[-1:], 0, keep_fraction=1.0)
    for k in options.k:
        gradients = {}
        flops = {}
        for kind in (EXACT, APPROXIMATE):
            model = decoder(options, groups, kind)
            model.load_state_dict(start.state_dict())
            flops[kind] = step_flops(model, batches.take(10_000), k)
            gradients[kind] = {name: p.grad.clone() for name, p in model.named_parameters()}
            equal_compute = [point * flops[EXACT] // flops[kind] for point in quarters]
            before = time.process_time()
            held_out = train(
                model, batches, sorted({*quarters, *equal_compute}), 1, keep_fraction=k
            )
            at_equal_steps = [held_out[step] for step in quarters]
            at_equal_compute = [held_out[step] for step in equal_compute]
            rows.append(
                {
                    "benchmark": "backward_rows loss",
                    "k": k,
                    "backward": kind,
                    "at_equal_steps": at_equal_steps,
                    "at_equal_compute": at_equal_compute,
                    "equal_compute_steps": equal_compute,
                    "cpu_seconds": round(time.process_time() - before, 1),
                    "flops_ratio": round(flops[kind] / flops[EXACT], 4),
                }
            )
        rows.append(
            {
                "benchmark": "backward_rows cosine",
                "k": k,
                "cosine_by_layer": cosines(
                    gradients[EXACT], gradients[APPROXIMATE], options.layers
                ),
            }
        )
    return rows


def train(
    model: torch.nn.Module, batches: Batches, points: list[int], phase: int, *, keep_fraction: float
) -> dict[int, float]:
    """Adam up to the last of `points` (steps); returns the held-out plain loss at each of them."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    held_out = {}
    for step in range(1, points[-1] + 1):
        optimizer.zero_grad()
        backward(model, batches.take(phase * 1_000_000 + step), keep_fraction)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step in points:
            held_out[step] = round(evaluate(model, batches), 4)
    return held_out


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Batches) -> float:
    losses = []
    for seed in range(4):
        batch = batches.take(seed, batches.held_out)
        positions_BS = torch.arange(batch.shape[1] - 1).expand(len(batch), -1)
        head = model(batch[:, :-1], positions_BS, None, labels=batch[:, 1:])
        losses.append(head.loss_BS.mean().item())
    return statistics.mean(losses)


def cosines(
    exact: dict[str, torch.Tensor], other: dict[str, torch.Tensor], layers: int
) -> dict[str, float]:
    """Cosine between the two gradients: of each layer's parameters together, and of everything."""
    markers = {str(layer): f"layers.{layer}." for layer in range(layers)}
    markers |= {"embedding": "embedding", "all": ""}
    result = {}
    for key, marker in markers.items():
        names = [name for name in exact if marker in name]
        cosine = F.cosine_similarity(_joined(exact, names), _joined(other, names), dim=0)
        result[key] = round(cosine.item(), 4)
    return result


def _joined(gradients: dict[str, torch.Tensor], names: list[str]) -> torch.Tensor:
    return torch.cat([gradients[name].flatten() for name in names])


if __name__ == "__main__":
    sys.exit(main())
