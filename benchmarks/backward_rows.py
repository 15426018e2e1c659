"""Backward that follows the selection, on a real megatron-core decoder: its time, and how far its gradient is from the exact one.

    python -m benchmarks.backward_rows time                # forward + backward seconds: exact, last layer only, every layer
    python -m benchmarks.backward_rows quality             # cosine to the exact gradient per layer, and held-out loss of both

`last_layer` is exact; `every_layer` drops the gradient of unselected tokens at each layer's entry, which is an approximation: the
second command is its quality check. Text: the Python standard library's source, one byte per token. Selection: the k tokens
of highest loss of each micro-batch. CPU time of one thread, interleaved rounds; one JSON line per result.
"""

import argparse
import json
import statistics
import sys
import sysconfig
from functools import partial
from pathlib import Path

import torch
import torch.nn.functional as F

from benchmarks.measure import seconds_per_call
from megatron_slm import device as device_room
from megatron_slm import parallel
from megatron_slm.config.schema import Config, ParallelConfig
from megatron_slm.ops.row_skipping import drop_unselected_rows, skip_zero_gradient_rows

BYTES = 256


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.backward_rows", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["time", "quality"])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--seq", type=int, default=512)
    parser.add_argument("--mbs", type=int, default=4)
    parser.add_argument("--k", type=float, nargs="+", default=[0.6, 0.4], help="kept fractions")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=100, help="quality: plain steps first, then as many with each backward")
    options = parser.parse_args(argv)
    torch.set_num_threads(1)
    groups = parallel.start(ParallelConfig(), device_room.choose("cpu"), seed=1)
    try:
        rows = times(options, groups) if options.what == "time" else quality(options, groups)
        for row in rows:
            print(json.dumps(row), flush=True)
    finally:
        parallel.stop()
    return 0


def decoder(options: argparse.Namespace, groups, kind: str) -> torch.nn.Module:
    """A fresh model, the same weights every time. kind: exact, last_layer or every_layer."""
    from megatron_slm.model.build import build_model  # imports megatron-core, which the device room must prepare for CPU first

    config = Config()
    config.model.layers, config.model.hidden_size, config.model.ffn_hidden_size = options.layers, options.hidden, options.hidden * 8 // 3
    config.data.sequence_length = options.seq
    (model,) = build_model(config, BYTES, groups)
    if kind == "last_layer":
        skip_zero_gradient_rows(model.decoder.layers[-1])
    if kind == "every_layer":
        drop_unselected_rows(model.decoder.layers)
        skip_zero_gradient_rows(model.decoder)
    return model


def backward(model: torch.nn.Module, batch: torch.Tensor, keep_fraction: float) -> float:
    """One forward and backward of the selected tokens' mean loss; returns the mean over all tokens."""
    tokens_BS, labels_BS = batch[:, :-1], batch[:, 1:]
    positions_BS = torch.arange(tokens_BS.shape[1]).expand_as(tokens_BS)
    loss_BS = model(tokens_BS, positions_BS, None, labels=labels_BS)
    kept = round(keep_fraction * loss_BS.numel())
    weight_BS = torch.zeros(loss_BS.numel()).index_fill_(0, loss_BS.detach().flatten().topk(kept).indices, 1.0 / kept).view_as(loss_BS)
    (loss_BS * weight_BS).sum().backward()
    return loss_BS.detach().mean().item()


class Batches:
    """Windows of the standard library's source; the last tenth is held out."""

    def __init__(self, options: argparse.Namespace):
        files = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py"))
        text = b"".join(path.read_bytes() for path in files)
        data = torch.frombuffer(bytearray(text), dtype=torch.uint8).long()
        cut = len(data) * 9 // 10
        self.train, self.held_out, self.options = data[:cut], data[cut:], options

    def take(self, seed: int, data: torch.Tensor | None = None) -> torch.Tensor:
        data = self.train if data is None else data
        generator = torch.Generator().manual_seed(seed)
        starts = torch.randint(0, len(data) - self.options.seq - 1, (self.options.mbs,), generator=generator)
        return torch.stack([data[start : start + self.options.seq + 1] for start in starts])


def times(options: argparse.Namespace, groups) -> list[dict]:
    batch = Batches(options).take(0)
    kinds = ("exact", "last_layer", "every_layer")
    models = {kind: decoder(options, groups, kind) for kind in kinds}
    rows = []
    for k in options.k:
        seconds = seconds_per_call({kind: partial(backward, models[kind], batch, k) for kind in kinds}, "cpu", options.rounds)
        median = {kind: statistics.median(values) for kind, values in seconds.items()}
        row = {"benchmark": "backward_rows time", "k": k, "layers": options.layers, "hidden": options.hidden, "tokens": options.mbs * options.seq}
        row |= {f"{kind}_median_seconds": round(value, 3) for kind, value in median.items()}
        rows.append(row | {f"{kind}_ratio": round(median[kind] / median["exact"], 3) for kind in kinds[1:]})
    return rows


def quality(options: argparse.Namespace, groups) -> list[dict]:
    batches, rows = Batches(options), []
    start = decoder(options, groups, "exact")
    train(start, batches, options.steps, 0, keep_fraction=1.0)
    for k in options.k:
        gradients = {}
        for kind in ("exact", "every_layer"):
            model = decoder(options, groups, kind)
            model.load_state_dict(start.state_dict())
            backward(model, batches.take(10_000), k)
            gradients[kind] = {name: p.grad.clone() for name, p in model.named_parameters()}
            held_out = train(model, batches, options.steps, 1, keep_fraction=k)
            rows.append({"benchmark": "backward_rows loss", "k": k, "backward": kind, "held_out_nats_by_step": held_out})
        rows.append({"benchmark": "backward_rows cosine", "k": k, "cosine_by_layer": cosines(gradients["exact"], gradients["every_layer"], options.layers)})
    return rows


def train(model: torch.nn.Module, batches: Batches, steps: int, phase: int, *, keep_fraction: float) -> dict[int, float]:
    """Adam; returns held-out plain loss at four points."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, betas=(0.9, 0.95))
    held_out = {}
    for step in range(1, steps + 1):
        optimizer.zero_grad()
        backward(model, batches.take(phase * 1_000_000 + step), keep_fraction)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % max(steps // 4, 1) == 0:
            held_out[step] = round(evaluate(model, batches), 4)
    return held_out


@torch.no_grad()
def evaluate(model: torch.nn.Module, batches: Batches) -> float:
    losses = []
    for seed in range(4):
        batch = batches.take(seed, batches.held_out)
        positions_BS = torch.arange(batch.shape[1] - 1).expand(len(batch), -1)
        losses.append(model(batch[:, :-1], positions_BS, None, labels=batch[:, 1:]).mean().item())
    return statistics.mean(losses)


def cosines(exact: dict[str, torch.Tensor], other: dict[str, torch.Tensor], layers: int) -> dict[str, float]:
    """Cosine between the two gradients of each layer's parameters, taken together, and of everything."""
    groups = {str(layer): [name for name in exact if f"layers.{layer}." in name] for layer in range(layers)}
    groups |= {"embedding": [name for name in exact if "embedding" in name], "all": list(exact)}
    joined = {key: [torch.cat([side[name].flatten() for name in names]) for side in (exact, other)] for key, names in groups.items()}
    return {key: round(F.cosine_similarity(*pair, dim=0).item(), 4) for key, pair in joined.items()}


if __name__ == "__main__":
    sys.exit(main())
