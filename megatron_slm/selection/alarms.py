"""Heuristic warnings computed from reduced metrics: pure functions, each returns a sentence (what
was observed, and what to do) or None.

No torch, because the report calls the same functions as the run.
"""

from collections.abc import Mapping

# Mean |excess| below this means that reference and model are the same: fp16 storage rounds a loss
# of 3 nats by up to 0.001.
SAME_MODEL_NATS = 5e-3
# A share of equal scores above this means that token ids, not scores, make much of the choice.
TIED_FRACTION = 0.5
# More than this share of trained tokens without a score is a hole in the stored scores, not a
# rounding.
UNSCORED_FRACTION = 1e-3
# Distance of the realised kept fraction from the configured one that the rounding of small
# populations does not explain.
KEPT_TOLERANCE = 0.02


def warnings_of(
    summary: Mapping[str, float | list[float]],
    keep_fraction: float | None = None,
    *,
    ranked: bool = True,
) -> dict[str, str]:
    """name -> sentence for everything in `summary` (from diagnostics.summarise, over one interval)
    that needs a person.

    keep_fraction  what was configured for the interval; None when the scorer has no use for it or
                   its choice is meant to differ (union).
    ranked         whether tokens are chosen for what they are (`ranks_tokens`): what a reference is
                   worth to the choice is else no question.
    """
    findings = {
        "reference_is_the_model": _reference_is_the_model(summary),
        "scores_tied": _scores_tied(summary),
        "coverage_hole": _coverage_hole(summary),
        "scores_not_finite": _scores_not_finite(summary),
        "keep_fraction_not_met": _keep_fraction_not_met(summary, keep_fraction),
        "reference_overtaken": _reference_overtaken(summary) if ranked else None,
    }
    return {name: sentence for name, sentence in findings.items() if sentence}


def _reference_is_the_model(summary: Mapping) -> str | None:
    excess = summary.get("selection/absolute_excess_nats")
    if excess is None or excess >= SAME_MODEL_NATS:
        return None
    return (
        "The model's loss equals the reference's on almost every token (mean |excess| "
        f"{excess:.2g} nats), so rounding and ties make the choice. Was the reference scored with "
        "the checkpoint that training starts from? Train the reference on curated data first."
    )


def _scores_tied(summary: Mapping) -> str | None:
    tied = summary.get("selection/tied_fraction")
    if tied is None or tied < TIED_FRACTION:
        return None
    return (
        f"{tied:.0%} of the competing tokens have exactly the score of the threshold, so their ids "
        "make the choice. Look at the stored column: is it constant, or stored too coarsely (8 "
        "bits, bf16)?"
    )


def _coverage_hole(summary: Mapping) -> str | None:
    unscored = summary.get("selection/without_score_fraction", 0.0)
    if unscored < UNSCORED_FRACTION:
        return None
    return (
        f"{unscored:.2%} of the tokens in training have no score and are never selected. Finish "
        "the score run (its manifest.json holds the command), or score with a smaller stride."
    )


def _scores_not_finite(summary: Mapping) -> str | None:
    broken = summary.get("selection/non_finite_scores", 0.0)
    if not broken:
        return None
    return (
        f"{broken:.0f} tokens have an infinite score or a loss that is not a number; they are left "
        "out. A diverging model shows up here first; so does a reference loss above 65504 stored "
        "in fp16."
    )


def zero_gradient(step: int) -> str:
    """The warning for a step in which no token was trained on."""
    return (
        f"The gradient of step {step} is zero: no token of its global batch was trained on. All of "
        "them are the first tokens of documents (which are never trained on), have no score, or "
        "were given a weight of 0 by the scorer. Look at the corpora of data.train for documents "
        "of one token, and at the coverage of the stored scores (python -m data_tools.verify C "
        "--scores S)."
    )


def _keep_fraction_not_met(summary: Mapping, keep_fraction: float | None) -> str | None:
    kept = summary.get("selection/kept_fraction")
    if keep_fraction is None:
        return None
    if kept is None:
        return (
            "No token competed in this interval, so nothing was selected: every token is masked or "
            "has no score."
        )
    if abs(kept - keep_fraction) <= KEPT_TOLERANCE:
        return None
    return (
        f"{kept:.3f} of the competing tokens were kept, but keep_fraction is {keep_fraction:.3f}. "
        "Populations of a few tokens cannot meet it (at least one token of each is kept: choose a "
        "wider scope), and a running threshold lags while losses fall fast (scope data_parallel "
        "does not)."
    )


def ranks_tokens(scorer: str, keep_fraction: object = None) -> bool:
    """Whether a run of this scorer prefers some tokens to others: not when it trains on all of
    them, nor when chance chooses.

    keep_fraction: a number, or anything else (a schedule, None) for one that is not 1 all the time.
    """
    return scorer not in ("none", "random") and keep_fraction != 1.0


def reference_overtaken(all_nats: float, reference_nats: float) -> str | None:
    """The warning if the model has overtaken its reference, else None: the same rule for run and
    report.

    Both losses are means over all tokens, never over the selected ones. Those are selected because
    the model is behind on them, so on them it stays behind for as long as the losses of single
    tokens scatter, however far ahead it is on the rest.
    """
    if all_nats > reference_nats:
        return None
    return (
        f"The model has overtaken the reference: {all_nats:.3f} against {reference_nats:.3f} nats "
        "on all tokens. From here the excess loss says less about which tokens are worth learning: "
        "train a better reference. Plain training from here gave most of the lead away where it "
        "was tried (docs/evidence.md, When the lead ends)."
    )


def selection_ended(step: int) -> str:
    """What a run says when selection.end_when_overtaken has ended its selection."""
    return (
        f"The selection has ended after step {step}, because the model has overtaken its reference "
        "(selection.end_when_overtaken): every token is trained on from here."
    )


def selection_had_ended(tokens: int) -> str:
    """What the same run says when it is resumed; `tokens` were processed when it ended."""
    return (
        f"The selection ended after {tokens:,} tokens (selection.end_when_overtaken): every token "
        "is trained on."
    )


def _reference_overtaken(summary: Mapping) -> str | None:
    all_nats = summary.get("loss/all")
    reference_nats = summary.get("loss/reference")
    if all_nats is None or reference_nats is None:
        return None
    return reference_overtaken(all_nats, reference_nats)


def smallest_population(keep_fraction: float) -> int:
    """The least number of eligible tokens of which ceil(k * n) is within KEPT_TOLERANCE of k.

    Smaller populations always keep too many.
    """
    return max(1, round((1.0 - keep_fraction) / KEPT_TOLERANCE)) if keep_fraction < 1.0 else 1
