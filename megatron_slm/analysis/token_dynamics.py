"""How each token's loss moved over checkpoints: the categories of Rho-1 (Lin and others, 2024,
section 2.1).

T: tokens of a fixed validation set, C = n + 1 checkpoints at equal token spacing.
"""

from dataclasses import dataclass

import numpy as np

CATEGORIES = ("H→L", "L→H", "L→L", "H→H")
"""Names of the category codes 0..3: learned, unlearned, known throughout, never learned."""
UNDEFINED = -1
CHANGE_NATS = 0.2


@dataclass(frozen=True)
class TokenDynamics:
    """The category of every token, and what it was decided from."""

    category_T: np.ndarray
    """int8: index into CATEGORIES, -1 where a loss is not finite."""
    change_nats_T: np.ndarray
    """End minus start of the fitted line."""
    mean_last_loss_nats: float

    def shares(self) -> dict[str, float]:
        """Fraction of the defined tokens in each category (NaN when there are none)."""
        defined = self.category_T[self.category_T != UNDEFINED]
        counts = np.bincount(defined, minlength=len(CATEGORIES))
        return {
            name: float(count / defined.size) if defined.size else float("nan")
            for name, count in zip(CATEGORIES, counts, strict=True)
        }


def classify(loss_TC: np.ndarray, change_nats: float = CHANGE_NATS) -> TokenDynamics:
    """Equals, per token, a, b = numpy.polyfit(0..n, losses, 1); change = a * n.

    H→L when change < -change_nats, L→H when change > change_nats. Otherwise L→L when the last raw
    loss is at most the mean loss of all tokens at the last checkpoint, else H→H.

    loss_TC: nats, at least two checkpoints. A token with a loss that is not finite is undefined and
    outside the mean.
    """
    loss_TC = np.asarray(loss_TC, dtype=np.float64)
    if loss_TC.ndim != 2 or loss_TC.shape[1] < 2:
        raise ValueError(
            f"token losses have shape {loss_TC.shape}; expected [tokens, checkpoints] with at "
            "least 2 checkpoints"
        )
    defined_T = np.isfinite(loss_TC).all(axis=1)
    n = loss_TC.shape[1] - 1
    offset_C = np.arange(n + 1) - n / 2
    with np.errstate(invalid="ignore"):  # inf - inf in undefined tokens
        # Least squares: the offsets sum to 0, so the mean drops out.
        slope_T = loss_TC @ offset_C / (offset_C @ offset_C)
    change_T = np.where(defined_T, slope_T * n, np.nan)
    last_T = loss_TC[:, -1]
    mean_last = float(last_T[defined_T].mean()) if defined_T.any() else float("nan")
    category_T = np.select(
        [~defined_T, change_T < -change_nats, change_T > change_nats, last_T <= mean_last],
        [UNDEFINED, 0, 1, 2],
        default=3,
    ).astype(np.int8)
    return TokenDynamics(category_T, change_T, mean_last)
