"""How much of the selection a reference in fp8 changes, measured before a corpus is scored with it.

The tokens of some windows are scored by the same reference in fp32, in bf16 and in fp8, and by the
model that will be trained. The excess loss chooses the top share of them with each precision in
turn; the share of the chosen tokens that another precision leaves out is the change.
"""

import gc
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from itertools import combinations

import numpy as np
import torch
from torch.nn import Module

from megatron_slm.scoring.corpus import ReferenceRunner
from megatron_slm.selection import excess_loss, select_top


@dataclass(frozen=True)
class ChoiceChange:
    """The change of the selected set between every two ways to compute the reference."""

    tokens: int
    """Tokens that were scored in every way."""
    keep_fraction: float
    changed_fraction: dict[str, float]
    """For "bf16 -> fp8" the share of the set chosen with bf16 that the choice with fp8 leaves out;
    the other way it is the same, because the sets are of one size."""
    loss_rms_nats: dict[str, float]
    """Root mean square of the differences of the losses, likewise."""

    def __str__(self) -> str:
        changes = ", ".join(f"{name} {share:.2%}" for name, share in self.changed_fraction.items())
        return (
            f"share of the selected tokens that changes with the reference's precision, over "
            f"{self.tokens:,} tokens at keep fraction {self.keep_fraction}: {changes}"
        )

    def as_json(self) -> dict:
        return asdict(self)


def sampled_ranges(
    corpus_tokens: int, window_tokens: int, windows: int, seed: int = 0
) -> list[tuple[int, int]]:
    """Token ranges [start, end) of `windows` different windows, or of all there are."""
    count = -(-corpus_tokens // window_tokens)
    chosen = np.random.RandomState(seed).permutation(count)[:windows]
    return [
        (int(each) * window_tokens, min((int(each) + 1) * window_tokens, corpus_tokens))
        for each in sorted(chosen)
    ]


def losses_of(
    load: Callable[[], list[Module]],
    runner_of: Callable[[list[Module]], ReferenceRunner],
    ranges: list[tuple[int, int]],
) -> np.ndarray | None:
    """The losses of a model on these ranges, one after the other, fp32 [N]; None on ranks without.

    The model is freed before the function returns: one at a time is in memory. Every rank of the
    model-parallel group calls it with the same ranges.
    """
    runner = runner_of(load())
    found = [runner.score_range(start, end) for start, end in ranges]
    collects = runner.collects
    del runner
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    return np.concatenate([columns["loss"] for columns in found]) if collects else None


def choice_change(
    model_loss_N: np.ndarray, reference_losses: Mapping[str, np.ndarray], keep_fraction: float
) -> ChoiceChange:
    """The changes between every two of the references, in the order given.

    model_loss_N: fp32 losses of the model to be trained; reference_losses: fp32 [N] by precision.
    Tokens without a finite loss anywhere (first tokens of documents) take no part.
    """
    everything = np.stack([model_loss_N, *reference_losses.values()])
    eligible_N = torch.from_numpy(np.isfinite(everything).all(0))
    loss_N = torch.from_numpy(model_loss_N)
    chosen = {
        name: select_top(
            excess_loss(loss_N, torch.from_numpy(values_N)), eligible_N, keep_fraction
        ).mask
        for name, values_N in reference_losses.items()
    }
    changed = {}
    rms = {}
    for before, after in combinations(reference_losses, 2):
        pair = f"{before} -> {after}"
        kept = int(chosen[before].sum())
        changed[pair] = int((chosen[before] & ~chosen[after]).sum()) / max(kept, 1)
        difference_N = (reference_losses[after] - reference_losses[before])[eligible_N.numpy()]
        rms[pair] = float(np.sqrt(np.mean(np.square(difference_N, dtype=np.float64))))
    return ChoiceChange(int(eligible_N.sum()), keep_fraction, changed, rms)
