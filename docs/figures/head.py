"""Draw head.svg, the picture of docs/head.md: which rows each kind of loss head computes.  python
docs/figures/head.py [OUTPUT]
"""

import sys
from pathlib import Path

import matplotlib

matplotlib.use("svg")
import matplotlib.pyplot as plt
from matplotlib.patches import Patch, Rectangle

KEPT = [True, False, True, True, False, True, False, True, False, True]  # k = 0.6
STAGES = ["logits,\nloss", "logits\nagain", "gradient\nof hidden", "gradient\nof weight"]
HEADS = {
    "logits materialised\n(megatron-core)\n6": ["all", None, "all", "all"],
    "fused, per-token loss\n(other libraries)\n8": ["all", "all", "all", "all"],
    "recompute\n\n2 + 6k = 5.6": ["all", "kept", "kept", "kept"],
    "keep\n\n2 + 4k = 4.4": ["all", None, "kept", "kept"],
    "selection known before\n\n6k = 3.6": ["kept", None, "kept", "kept"],
}
SELECTED, WASTED, NOTHING = "#1f6f8b", "#e2b07a", "#f4f4f4"


def main(output: Path) -> None:
    plt.rcParams.update(
        {"font.family": "DejaVu Sans", "svg.hashsalt": "head", "svg.fonttype": "none"}
    )
    figure, axes = plt.subplots(1, len(HEADS), figsize=(12.5, 4.1))
    for axis, (title, stages) in zip(axes, HEADS.items(), strict=True):
        draw(axis, title, stages)
    axes[0].set_ylabel("tokens of a micro-batch", fontsize=9)
    legend = [
        Patch(facecolor=SELECTED, label="computed, token selected"),
        Patch(facecolor=WASTED, label="computed, token not selected"),
        Patch(facecolor=NOTHING, edgecolor="#bbbbbb", label="never computed"),
    ]
    figure.legend(handles=legend, loc="lower center", ncols=3, frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.08, 1, 1))
    figure.savefig(output, metadata={"Date": None})


def draw(axis, title: str, stages: list[str | None]) -> None:
    for x, rows in enumerate(stages):
        for y, kept in enumerate(KEPT):
            computed = rows == "all" or (rows == "kept" and kept)
            color = NOTHING
            if computed:
                color = SELECTED if kept else WASTED
            axis.add_patch(
                Rectangle(
                    (x, len(KEPT) - 1 - y),
                    0.92,
                    0.86,
                    facecolor=color,
                    edgecolor="#bbbbbb",
                    linewidth=0.4,
                )
            )
    axis.set(
        xlim=(-0.1, len(stages)),
        ylim=(-0.1, len(KEPT)),
        yticks=[],
        xticks=[x + 0.46 for x in range(len(stages))],
    )
    axis.set_xticklabels(STAGES, fontsize=6.5)
    axis.tick_params(length=0)
    axis.set_title(title, fontsize=9)
    for side in axis.spines.values():
        side.set_visible(False)


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else Path(__file__).with_name("head.svg"))
