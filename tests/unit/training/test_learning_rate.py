"""Learning rates at the ends, after warm-up and in the middle, against formulas written out."""

import math

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.training.learning_rate import learning_rate

PEAK, LEAST, STEPS = 1e-3, 1e-4, 100


def rates(style, *, warmup=0.1, decay=0.2, steps=STEPS) -> list[float]:
    """Rates of steps 1..steps."""
    config = Config()
    config.optimizer.learning_rate, config.optimizer.min_learning_rate = PEAK, LEAST
    config.schedule.style, config.schedule.train_steps = style, steps
    config.schedule.warmup_fraction, config.schedule.decay_fraction = warmup, decay
    return [learning_rate(config, step, steps) for step in range(1, steps + 1)]


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "wsd"])
def test_warm_up_is_linear_and_reaches_the_peak(style):
    assert rates(style)[:10] == pytest.approx([PEAK * step / 10 for step in range(1, 11)])
    assert max(rates(style)) == rates(style)[9] == PEAK


@pytest.mark.parametrize(
    "style, last", [("constant", PEAK), ("linear", LEAST), ("cosine", LEAST), ("wsd", LEAST)]
)
def test_the_last_step(style, last):
    assert rates(style)[-1] == pytest.approx(last)


def test_linear():
    assert rates("linear")[54] == pytest.approx(
        (PEAK + LEAST) / 2
    )  # step 55: half way from 10 to 100
    assert rates("linear")[10] == pytest.approx(PEAK - (PEAK - LEAST) / 90)


def test_cosine():
    assert rates("cosine")[54] == pytest.approx((PEAK + LEAST) / 2)
    assert rates("cosine")[32] == pytest.approx(
        LEAST + (PEAK - LEAST) * 0.5 * (1 + math.cos(math.pi * 23 / 90))
    )


def test_wsd_is_constant_until_the_decay():
    values = rates("wsd")
    assert values[9:80] == [PEAK] * 71  # steps 10..80
    assert values[80:] == pytest.approx([PEAK - (PEAK - LEAST) * k / 20 for k in range(1, 21)])


def test_wsd_never_decays_inside_the_warm_up():
    values = rates("wsd", warmup=0.5, decay=0.9)
    assert values[49] == PEAK
    assert values[-1] == pytest.approx(LEAST)
    assert values[50] == pytest.approx(
        PEAK - (PEAK - LEAST) / 50
    )  # the decay begins where the warm-up ends


@pytest.mark.parametrize("style", ["constant", "linear", "cosine", "wsd"])
@pytest.mark.parametrize(
    "warmup, decay, steps",
    [(0.0, 0.2, 10), (0.0, 0.0, 10), (1.0, 1.0, 10), (0.02, 0.2, 1), (0.001, 0.001, 7)],
)
def test_corner_cases_stay_between_zero_and_the_peak(style, warmup, decay, steps):
    values = rates(style, warmup=warmup, decay=decay, steps=steps)
    assert all(0 < value <= PEAK for value in values)


def test_without_warm_up_the_first_step_is_already_on_the_curve():
    assert rates("linear", warmup=0.0)[0] == pytest.approx(PEAK - (PEAK - LEAST) / STEPS)
    assert rates("constant", warmup=0.0) == [PEAK] * STEPS
