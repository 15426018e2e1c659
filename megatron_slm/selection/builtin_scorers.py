"""The scorers of the literature, one function each (equations and sources: docs/selection.md).

B, S and columns: see scorers.py.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from megatron_slm.selection.scorers import excess_loss, register_scorer

if TYPE_CHECKING:
    from torch import Tensor

# ---- ranked by the model's own loss and the reference's ----


@register_scorer("excess_loss", needs=("loss", "{column}"))
def _excess_loss(columns, progress, *, column="reference_loss"):
    """L_theta - L_ref. Rho-1, equation 3."""
    return excess_loss(columns["loss"], columns[column])


@register_scorer("own_loss", needs=("loss",))
def _own_loss(columns, progress):
    """L_theta: the top k is what lies above the (1 - k) quantile. ESLM with loss as the risk (value
    at risk); also hard-token baselines.
    """
    return columns["loss"]


@register_scorer("own_entropy", needs=("loss", "entropy"))
def _own_entropy(columns, progress):
    """H_theta above its (1 - k) quantile. ESLM with entropy as the risk."""
    return columns["entropy"]


@register_scorer("history", needs=("loss", "{column}"))
def _history(columns, progress, *, column="history_loss"):
    """L_history - L_theta: what the model has learned since that checkpoint. ssToken and REL.

    `column` holds losses of an earlier checkpoint.
    """
    return columns[column] - columns["loss"]


# ---- static: stored columns only, so the choice does not depend on the model ----


@register_scorer("reference_loss", needs=("{column}",))
def _reference_loss(columns, progress, *, column="reference_loss"):
    """-L_ref: keeps what the reference predicts best. Rho-1, self-reference."""
    return -columns[column]


@register_scorer("reference_entropy", needs=("{column}",))
def _reference_entropy(columns, progress, *, column="reference_entropy"):
    """-H_ref: keeps where the reference is most certain. Rho-1, self-reference."""
    return -columns[column]


@register_scorer("color_filter", needs=("{prior}", "{conditional}"))
def _color_filter(columns, progress, *, prior="prior_loss", conditional="conditional_loss"):
    """L_prior - L_conditional: a model before and after fine-tuning on the target data.

    CoLoR-Filter.
    """
    return columns[prior] - columns[conditional]


@register_scorer("token_cleaning", needs=("{base}", "{reference}"))
def _token_cleaning(columns, progress, *, base="base_loss", reference="reference_loss"):
    """L_base - L_ref, both fixed. Token Cleaning (fixed-model cleaning)."""
    return columns[base] - columns[reference]


@register_scorer("stored_score", needs=("{column}",))
def _stored_score(columns, progress, *, column):
    """Any stored column, highest kept."""
    return columns[column]


# ---- decided without a ranking ----


@register_scorer("none", needs=("token_id",), kind="mask")
def _none(columns, progress):
    """Every eligible token: plain causal language modeling."""
    token_id = columns["token_id"]
    return (token_id == token_id).float()


@register_scorer("stored_mask", needs=("{column}",), kind="mask")
def _stored_mask(columns, progress, *, column):
    """A stored 0/1 column (token-level data filtering). Above 0 is kept, NaN is not."""
    return columns[column]


# ---- soft weights: the divisor is their sum ----


@register_scorer("stored_weight", needs=("{column}",), kind="weight")
def _stored_weight(columns, progress, *, column):
    """A stored column of weights; negative, NaN and infinite ones count as 0."""
    return columns[column]


@register_scorer("entropy_weight", needs=("loss", "entropy"), kind="weight")
def _entropy_weight(columns, progress, *, gamma=1.0):
    """H_theta ** gamma: tokens weigh more the harder they are to predict. MiLe loss."""
    return columns["entropy"].clamp(min=0.0) ** gamma


@register_scorer("long_context_weight", needs=("loss", "{column}"), kind="weight")
def _long_context_weight(columns, progress, *, column="short_context_loss", cap=5.0):
    """min(exp(L_short - L_theta), cap): tokens that the long context helps weigh more. LongCE.

    `column` holds short-context losses.
    """
    return (columns[column] - columns["loss"]).exp().clamp(max=cap)


# ---- baseline ----


@register_scorer("random", needs=("token_id",))
def _random(columns, progress, *, seed=0):
    """Uniform in [0, 1) from (seed, step, token id): the same draw on every rank."""
    token_id = columns["token_id"]
    stream = _mix(_mix(token_id.new_tensor([seed])) + progress.step)
    return ((_mix(token_id + stream) >> 40) & 0xFFFFFF).float() * 2.0**-24


def _mix(x: Tensor) -> Tensor:
    """splitmix64: a bijection of int64 in which every input bit moves every output bit.

    int64 products wrap, as they should here.
    """
    x = x + (0x9E3779B97F4A7C15 - (1 << 64))
    x = (x ^ _shift(x, 30)) * (0xBF58476D1CE4E5B9 - (1 << 64))
    x = (x ^ _shift(x, 27)) * (0x94D049BB133111EB - (1 << 64))
    return x ^ _shift(x, 31)


def _shift(x: Tensor, bits: int) -> Tensor:
    """Logical right shift: torch has only the arithmetic one, which copies the sign."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)
