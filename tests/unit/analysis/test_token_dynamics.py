"""Rho-1's token categories against numpy.polyfit, token by token."""

import numpy as np
import pytest

from megatron_slm.analysis.token_dynamics import CATEGORIES, classify


def by_polyfit(loss_TC):
    """docs/method.md#token-categories, with numpy's own fit.

    l_i ~ a x_i + b, x = 0..n; change = a n; L_mean = mean of all tokens at the last checkpoint.
    """
    n = loss_TC.shape[1] - 1
    mean_last = loss_TC[:, -1].mean()
    names, changes = [], []
    for losses in loss_TC:
        slope, _ = np.polyfit(np.arange(n + 1), losses, 1)
        change = slope * n
        changes.append(change)
        if change < -0.2:
            names.append("H→L")
        elif change > 0.2:
            names.append("L→H")
        else:
            names.append("L→L" if losses[-1] <= mean_last else "H→H")
    return names, np.array(changes), mean_last


@pytest.mark.parametrize("checkpoints", [2, 3, 8])
def test_equals_polyfit(checkpoints):
    rng = np.random.default_rng(0)
    loss_TC = (
        rng.gamma(2.0, 1.2, (300, 1))
        + rng.normal(0, 0.3, (300, 1)) * np.arange(checkpoints) / checkpoints
        + rng.normal(0, 0.1, (300, checkpoints))
    )
    names, changes, mean_last = by_polyfit(loss_TC)
    dynamics = classify(loss_TC)
    assert [CATEGORIES[code] for code in dynamics.category_T] == names
    assert set(names) == set(CATEGORIES), "the data must reach every category"
    np.testing.assert_allclose(dynamics.change_nats_T, changes, rtol=0, atol=1e-9)
    assert dynamics.mean_last_loss_nats == pytest.approx(mean_last)
    assert dynamics.shares() == pytest.approx(
        {name: names.count(name) / 300 for name in CATEGORIES}
    )


def test_borders_and_ties():
    # A change of exactly 0.2 (here 0.25 with the border moved there: exact in binary) is neither
    # rise nor fall.
    loss_TC = np.array([[1.0, 1.25], [1.25, 1.0], [1.0, 1.5], [1.5, 1.0]])
    dynamics = classify(loss_TC, change_nats=0.25)
    assert dynamics.mean_last_loss_nats == 1.1875
    assert [CATEGORIES[code] for code in dynamics.category_T] == ["H→H", "L→L", "L→H", "H→L"]
    # A last loss equal to the mean counts as low.
    assert [CATEGORIES[code] for code in classify(np.full((3, 4), 2.0)).category_T] == ["L→L"] * 3


def test_the_fitted_line_decides_not_the_end_points():
    # End points are equal, the line rises: 0, 0, 1, 1, 0 has slope 0.1 per step and change 0.4.
    assert CATEGORIES[classify(np.array([[0.0, 0.0, 1.0, 2.0, 0.0]])).category_T[0]] == "L→H"


def test_undefined_tokens_stay_out_of_the_mean():
    dynamics = classify(np.array([[1.0, 1.0], [np.nan, 9.0], [np.inf, 9.0], [3.0, 3.0]]))
    assert dynamics.category_T.tolist() == [2, -1, -1, 3]
    assert dynamics.mean_last_loss_nats == 2.0
    assert dynamics.shares()["L→L"] == 0.5


def test_one_checkpoint_is_refused():
    with pytest.raises(ValueError, match="at least 2 checkpoints"):
        classify(np.ones((5, 1)))
