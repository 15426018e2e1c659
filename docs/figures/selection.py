"""Draw the pictures of docs/selection.md: python docs/figures/selection.py (needs matplotlib).

scopes.svg     which tokens compete with which, for two ranks with two micro-batches of two
               sequences
scorers.png    which tokens each scorer keeps, in the plane of reference loss and current loss
running.svg    how far a running threshold is from the exact choice, by smoothing, on simulated
               steps
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
import torch

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parents[1]))

from megatron_slm.selection import (  # noqa: E402
    Population,
    RunningThreshold,
    TrainingProgress,
    build_scorer,
)

plt.rcParams |= {
    "svg.hashsalt": "selection",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}
KEEP = 0.6


def main() -> None:
    draw_scopes()
    draw_scorers()
    draw_running()


def draw_scopes() -> None:
    """Rows are sequences; a colour is a population."""
    sequences = [(rank, micro, row) for micro in range(2) for rank in range(2) for row in range(2)]
    populations = {
        "sequence": lambda rank, micro, row: (rank, micro, row),
        "micro_batch": lambda rank, micro, row: (rank, micro),
        "data_parallel": lambda rank, micro, row: micro,
        "global_batch": lambda rank, micro, row: 0,
        "running_threshold": lambda rank, micro, row: 0,
    }
    figure, axes = plt.subplots(1, 5, figsize=(11, 2.6), sharey=True)
    for axis, (scope, population) in zip(axes, populations.items(), strict=True):
        seen: dict = {}
        for place, where in enumerate(sequences):
            colour = plt.cm.tab10(seen.setdefault(population(*where), len(seen)))
            hatch = "////" if scope == "running_threshold" else None
            axis.barh(
                place, 1, height=0.85, color=colour, alpha=0.65, hatch=hatch, edgecolor="white"
            )
        axis.set_title(
            scope if scope != "running_threshold" else "running_threshold\n(with recent steps)",
            fontsize=9,
        )
        axis.axhline(3.5, color="black", linewidth=0.8)
        axis.set_xticks([])
    labels = [f"micro-batch {micro}, rank {rank}, row {row}" for rank, micro, row in sequences]
    axes[0].set_yticks(range(8), labels)
    axes[0].invert_yaxis()
    _save(figure, "scopes.svg")


def draw_scorers() -> None:
    columns = _tokens(2500)
    eligible, population = (
        torch.ones(1, 2500, dtype=torch.bool),
        Population("micro_batch", columns["token_id"]),
    )
    chosen = [
        ("none", {}, "none: plain CLM"),
        ("excess_loss", {}, "excess_loss"),
        ("reverse", {"of": "excess_loss"}, "reverse of excess_loss"),
        ("random", {}, "random"),
        ("own_loss", {}, "own_loss"),
        ("reference_loss", {}, "reference_loss"),
        ("reference_entropy", {}, "reference_entropy"),
        ("intersection", {}, "intersection\nreference_loss, reference_entropy"),
        ("union", {}, "union\nreference_loss, reference_entropy"),
        (
            "band",
            {"of": "excess_loss", "skip_fraction": 0.15},
            "band: excess_loss\nskip_fraction 0.15",
        ),
        (
            "weighted_sum",
            {"of": {"excess_loss": 1.0, "own_loss": 0.7}},
            "weighted_sum\n1.0 excess_loss + 0.7 own_loss",
        ),
        ("entropy_weight", {"gamma": 1.0}, "entropy_weight (shade = weight)"),
    ]
    figure, axes = plt.subplots(3, 4, figsize=(11, 7.6), sharex=True, sharey=True)
    for axis, (name, options, title) in zip(axes.flat, chosen, strict=True):
        selection = build_scorer(name, **options).choose(
            columns, eligible, KEEP, population, TrainingProgress()
        )
        axis.scatter(
            columns["reference_loss"], columns["loss"], s=1.5, c="lightgrey", rasterized=True
        )
        mask = selection.mask
        shade = selection.weights[mask] if selection.weight is not None else None
        colour = {"c": shade, "cmap": "viridis"} if shade is not None else {"c": "tab:blue"}
        axis.scatter(
            columns["reference_loss"][mask], columns["loss"][mask], s=1.5, rasterized=True, **colour
        )
        axis.plot([0, 7], [0, 7], color="black", linewidth=0.6)
        axis.set_title(f"{title}\n{selection.kept / selection.eligible:.0%} kept", fontsize=8)
        axis.set(xlim=(0, 7), ylim=(0, 7))
    figure.supxlabel("reference loss, nats")
    figure.supylabel("current loss, nats")
    _save(figure, "scorers.png")


def _tokens(count: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    reference = torch.rand(1, count, generator=generator).pow(1.7) * 6
    loss = (reference + torch.randn(1, count, generator=generator) * 0.9 + 0.2).clamp(min=0.0)
    entropy = (0.7 * reference + torch.rand(1, count, generator=generator) * 1.6).clamp(min=0.0)
    names = {
        "loss": loss,
        "reference_loss": reference,
        "entropy": entropy,
        "reference_entropy": entropy,
    }
    return names | {"token_id": torch.arange(count).view(1, -1)}


def draw_running() -> None:
    """Steps of 64 documents of 256 tokens: excess = drift + document offset (0.3 nats) + token
    noise (0.5 nats).
    """
    figure, axis = plt.subplots(figsize=(6, 2.8))
    for smoothing in (0.0, 0.5, 0.9, 0.98):
        generator = torch.Generator().manual_seed(1)
        running, wrong = RunningThreshold(smoothing), []
        for step in range(120):
            drift = 0.8 * 0.97**step
            score = (
                drift
                + torch.randn(64, 1, generator=generator) * 0.3
                + torch.randn(64, 256, generator=generator) * 0.5
            )
            running.choose(score, torch.ones_like(score, dtype=torch.bool), KEEP)
            measured = running.finish_step(KEEP)
            missed, extra = (float(total / count) for total, count in measured.values())
            wrong.append(missed + extra)
        late = sum(wrong[60:]) / 60
        axis.plot(wrong[1:], label=f"smoothing {smoothing}: {late:.1%} later", linewidth=1)
        print(
            f"smoothing {smoothing}: missed + extra {sum(wrong[1:30]) / 29:.4f} in steps 1-29, "
            f"{late:.4f} in steps 60-119"
        )
    axis.set(xlabel="step", ylabel="(missed + extra) / exact set", ylim=(0, 0.3))
    axis.legend(frameon=False, fontsize=8)
    _save(figure, "running.svg")


def _save(figure, name: str) -> None:
    figure.tight_layout()
    figure.savefig(HERE / name, dpi=80, metadata={"Date": None} if name.endswith("svg") else None)
    plt.close(figure)


if __name__ == "__main__":
    main()
