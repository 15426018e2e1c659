import pytest

from megatron_slm.selection import build_schedule


def test_a_number_is_constant():
    assert (
        build_schedule(0.6)(0) == build_schedule({"style": "constant", "value": 0.6})(10**12) == 0.6
    )


def test_linear_goes_straight_and_stays():
    keep = build_schedule(
        {"style": "linear", "start": 1.0, "end": 0.6, "tokens": 1000, "hold_tokens": 200}
    )
    assert [keep(tokens) for tokens in (0, 200, 700, 1200, 10**9)] == pytest.approx(
        [1.0, 1.0, 0.8, 0.6, 0.6]
    )


def test_cosine_starts_and_ends_gently():
    keep = build_schedule({"style": "cosine", "start": 1.0, "end": 0.6, "tokens": 1000})
    assert [keep(tokens) for tokens in (0, 250, 500, 750, 1000)] == pytest.approx(
        [1.0, 0.9414214, 0.8, 0.6585786, 0.6]
    )


def test_warmup_holds_plain_clm_first_and_may_jump():
    keep = build_schedule({"style": "warmup", "end": 0.6, "hold_tokens": 100})
    assert (keep(0), keep(99), keep(100)) == (1.0, 1.0, 0.6)
    assert build_schedule({"style": "warmup", "end": 0.6, "tokens": 100})(50) == pytest.approx(0.8)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        (0.0, "keep_fraction must be above 0 and at most 1, got 0.0"),
        (1.2, "at most 1, got 1.2"),
        ("0.6", "must be a number or a mapping with a style, got '0.6'"),
        (True, "must be a number"),
        ({"style": "step"}, "style must be one of constant, linear, cosine, warmup, got 'step'"),
        ({"start": 1.0}, "style must be one of"),
        ({"style": "linea", "start": 1.0}, "got 'linea', did you mean 'linear'?"),
        (float("nan"), "keep_fraction must be above 0"),
        (
            {"style": "linear", "start": 1.0, "end": 0.6, "tokens": float("inf")},
            "keep_fraction.tokens must be a whole number of tokens",
        ),
        ({"style": "linear", "start": 1.0, "end": 0.6}, "style linear also needs tokens"),
        (
            {"style": "warmup", "end": 0.6, "start": 0.8, "tokens": 5},
            "style warmup does not take start",
        ),
        (
            {"style": "linear", "start": 1.0, "end": 0.0, "tokens": 5},
            "keep_fraction.end must be above 0",
        ),
        ({"style": "linear", "start": 1.0, "end": 0.5, "tokens": 5.5}, "whole number of tokens"),
        ({"style": "warmup", "end": 0.5}, "must last some time"),
        ({"style": "constant", "value": 7}, "keep_fraction.value must be above 0"),
    ],
)
def test_mistakes_are_explained(setting, message):
    with pytest.raises(ValueError, match=message):
        build_schedule(setting)


def test_zero_is_allowed_for_a_mixture():
    assert build_schedule(0.0, "clm_weight", allow_zero=True)(5) == 0.0
