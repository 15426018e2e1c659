"""The configured scorer, and what is refused before a run starts."""

import pytest

from megatron_slm.config.schema import ReferenceConfig, SelectionConfig
from megatron_slm.training.scorer_settings import choice_rules


def settings(scorer, *, scores=(), checkpoint=None, **rest) -> SelectionConfig:
    return SelectionConfig(
        scorer=scorer, reference=ReferenceConfig(list(scores), checkpoint=checkpoint), **rest
    )


@pytest.mark.parametrize(
    "given",
    [
        settings("none"),
        settings("random"),
        settings("own_loss"),
        settings("excess_loss", scores=["s"]),
        settings("excess_loss", checkpoint="r"),
        settings("reference_loss", scores=["s"]),
        settings(
            "excess_loss",
            scores=["s"],
            keep_fraction={"style": "linear", "start": 1.0, "end": 0.6, "tokens": 10},
        ),
    ],
)
def test_good_settings(given):
    assert choice_rules(given).scorer.needs is not None


@pytest.mark.parametrize("scorer", ["excess_loss", "reference_loss"])
def test_a_missing_reference_says_how_to_get_one(scorer):
    advice = r"give selection.reference.scores \(python -m megatron_slm.score"
    with pytest.raises(ValueError, match=f"{scorer} reads reference_loss; {advice}"):
        choice_rules(settings(scorer))


def test_an_online_reference_has_no_other_columns():
    with pytest.raises(ValueError, match="use stored scores"):
        choice_rules(settings("stored_score", checkpoint="r", scorer_options={"column": "quality"}))


def test_an_unknown_scorer_names_the_known_ones():
    with pytest.raises(ValueError, match="excess_loss"):
        choice_rules(settings("exces_loss", scores=["s"]))


def test_a_wrong_option_names_the_right_ones():
    with pytest.raises(ValueError, match="banana"):
        choice_rules(settings("excess_loss", scores=["s"], scorer_options={"banana": 1}))


def test_a_schedule_that_makes_no_sense():
    with pytest.raises(ValueError, match="style|start|end"):
        choice_rules(settings("none", keep_fraction={"style": "sideways"}))


def test_plain_loss_is_mixed_in_when_asked():
    assert choice_rules(settings("excess_loss", scores=["s"])).scorer.name == "excess_loss"
    assert (
        choice_rules(settings("excess_loss", scores=["s"], clm_weight=0.25)).scorer.name
        == "mixed_with_clm"
    )


@pytest.mark.parametrize(
    "scorer, scope, head_rows, selected_rows",
    [
        ("excess_loss", "data_parallel", "auto", False),
        ("excess_loss", "global_batch", "auto", True),
        ("excess_loss", "global_batch", "all", False),
        ("reference_loss", "global_batch", "auto", False),
        ("reference_loss", "running_threshold", "selected", True),
        ("random", "sequence", "selected", True),
        ("none", "data_parallel", "auto", False),
    ],
)
def test_the_head_leaves_rows_out_where_every_loss_is_known_anyway_or_when_asked(
    scorer, scope, head_rows, selected_rows
):
    given = settings(scorer, scores=["s"], scope=scope, head_rows=head_rows)
    assert choice_rules(given).head_on_selected_rows is selected_rows


def test_a_head_on_selected_rows_needs_a_choice_before_it():
    with pytest.raises(
        ValueError, match="scope data_parallel are known only after the head; use head_rows auto"
    ):
        choice_rules(settings("excess_loss", scores=["s"], head_rows="selected"))


def test_a_scorer_in_a_file_is_loaded_from_there(tmp_path):
    source = """
from megatron_slm.selection import register_scorer

@register_scorer("doubt", needs=("loss", "quality"))
def doubt(columns, progress):
    return columns["loss"] - columns["quality"]
"""
    (tmp_path / "mine.py").write_text(source)
    rules = choice_rules(settings(f"{tmp_path}/mine.py:doubt", scores=["s"], clm_weight=0.1))
    assert rules.stored_columns == {"quality"}
    with pytest.raises(ValueError, match="reads quality; an online reference gives"):
        choice_rules(settings(f"{tmp_path}/mine.py:doubt", checkpoint="r"))


OVERTAKEN = "selection.end_when_overtaken: got true with scorer "


def test_a_selection_may_end_when_its_reference_is_overtaken():
    for given in (
        settings("excess_loss", scores=["s"], end_when_overtaken=True),
        settings("excess_loss", checkpoint="r", end_when_overtaken=True),
        settings("own_loss", scores=["s"], end_when_overtaken=True),
        settings("reference_loss", scores=["s"], end_when_overtaken=True, scope="global_batch"),
    ):
        assert choice_rules(given).scorer.name == given.scorer


@pytest.mark.parametrize(
    ("given", "reason"),
    [
        (settings("none"), "none and keep_fraction 0.6, which prefers no token"),
        (settings("random"), "random and keep_fraction 0.6, which prefers no token"),
        (
            settings("excess_loss", scores=["s"], keep_fraction=1.0),
            "excess_loss and keep_fraction 1.0, which prefers no token",
        ),
        (settings("own_loss"), "own_loss and no reference to overtake"),
        (
            settings("reference_loss", scores=["s"], head_rows="selected"),
            "reference_loss and head_rows selected, which never compute the loss of all tokens",
        ),
    ],
)
def test_a_selection_that_would_never_end_is_refused(given, reason):
    given.end_when_overtaken = True
    with pytest.raises(ValueError, match=OVERTAKEN + reason):
        choice_rules(given)
