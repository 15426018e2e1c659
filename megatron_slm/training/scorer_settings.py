"""The selection section of a configuration as a scorer and its rules, checked without torch."""

from megatron_slm.config.schema import SelectionConfig
from megatron_slm.selection.alarms import ranks_tokens
from megatron_slm.selection.rules import ONLINE_COLUMNS, ChoiceRules, configured_scorer
from megatron_slm.selection.schedule import build_schedule
from megatron_slm.selection.scorer_files import load_scorer_files


def choice_rules(settings: SelectionConfig) -> ChoiceRules:
    """The configured choice. Runs the file of a scorer that is given as PATH.py:NAME, once per
    process.

    Raises ValueError for an unknown scorer, a wrong option, a keep fraction or scope that does not
    fit, and a reference that is missing or cannot give what the scorer reads.
    """
    load_scorer_files(settings.scorer, settings.scorer_options)
    scorer = configured_scorer(settings.scorer, settings.scorer_options, settings.clm_weight)
    rules = ChoiceRules(scorer, settings.scope, settings.head_rows)
    stored, reference = rules.stored_columns, settings.reference
    if stored and not (reference.scores or reference.checkpoint):
        raise ValueError(
            f"selection.scorer {settings.scorer} reads {', '.join(sorted(stored))}; give "
            "selection.reference.scores (python -m megatron_slm.score makes them) or "
            "selection.reference.checkpoint"
        )
    if reference.checkpoint and stored - ONLINE_COLUMNS:
        raise ValueError(
            f"selection.scorer {settings.scorer} reads {', '.join(sorted(stored))}; an online "
            "reference gives reference_loss and reference_entropy only: use stored scores"
        )
    build_schedule(settings.keep_fraction)
    rules.check()
    if settings.end_when_overtaken and (reason := _never_overtaken(settings, rules)):
        raise ValueError(f"selection.end_when_overtaken: got true {reason}")
    return rules


def _never_overtaken(settings: SelectionConfig, rules: ChoiceRules) -> str | None:
    """Why no log line of these settings can show that the model has overtaken its reference."""
    reference = settings.reference
    if not ranks_tokens(settings.scorer, settings.keep_fraction):
        return (
            f"with scorer {settings.scorer} and keep_fraction {settings.keep_fraction}, which "
            "prefers no token to another: there is no selection to end; set it to false"
        )
    if not (reference.scores or reference.checkpoint):
        return (
            f"with scorer {settings.scorer} and no reference to overtake; set it to false, or give "
            "selection.reference.scores or selection.reference.checkpoint"
        )
    if rules.loss_of_selected_only:
        return (
            f"with scorer {settings.scorer} and head_rows {settings.head_rows}, which never "
            "compute the loss of all tokens; set head_rows to all"
        )
    return None
