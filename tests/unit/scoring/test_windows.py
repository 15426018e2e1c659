import numpy as np
import pytest
from hypothesis import given, settings, strategies

from megatron_slm.scoring.windows import Window, WindowPlan, batches, padded_lengths


@settings(max_examples=300, deadline=None)
@given(
    lengths=strategies.lists(strategies.integers(1, 40), min_size=1, max_size=12),
    window=strategies.integers(1, 17),
    data=strategies.data(),
    policy=strategies.sampled_from(["packed", "isolated"]),
    shard=strategies.integers(1, 60),
)
def test_every_token_is_priced_once_with_the_promised_context(lengths, window, data, policy, shard):
    """docs/method.md#point-13: coverage, context, document borders; the same for all shards."""
    stride = data.draw(strategies.integers(1, window))
    starts = np.cumsum([0, *lengths[:-1]])
    total = sum(lengths)
    plan = WindowPlan(total, starts, window, stride, policy)
    spans = (
        [(0, total)]
        if policy == "packed"
        else list(zip(starts.tolist(), [*starts[1:].tolist(), total], strict=True))
    )
    span_of = {token: span for span in spans for token in range(*span)}
    inputs = {}
    for start in range(0, total, shard):
        for w in plan.windows(start, min(start + shard, total)):
            assert 1 <= w.inputs <= window
            assert w.first < w.score_start < w.score_end <= w.last + 1
            for token in range(w.score_start, w.score_end):
                assert token not in inputs
                inputs[token] = w.first
    assert sorted(inputs) == [token for token in range(total) if token != span_of[token][0]]
    for token, first in inputs.items():
        assert first >= span_of[token][0]
        assert token - first >= min(window - stride + 1, token - span_of[token][0])
    whole = {
        token: w.first
        for w in plan.windows(0, total)
        for token in range(w.score_start, w.score_end)
    }
    assert whole == inputs


def test_packed_windows_without_overlap_cost_one_pass():
    plan = WindowPlan(1000, np.array([0]), 100, 100, "packed")
    windows = list(plan.windows(0, 1000))
    assert len(windows) == 10
    assert sum(w.inputs for w in windows) == 999
    assert windows[0] == Window(0, 99, 1, 100)
    assert windows[3] == Window(299, 399, 300, 400)


def test_first_tokens_of_a_range():
    plan = WindowPlan(30, np.array([0, 7, 8, 20]), 4, 4, "packed")
    assert plan.first_tokens(7, 20).tolist() == [7, 8]


def test_batches_keep_every_window_and_fit_it():
    windows = [Window(0, length, 1, length + 1) for length in (3, 64, 20, 9, 16, 17, 1)]
    made = list(batches(windows, 2, [64, 16, 32]))
    assert [length for length, _ in made] == [16, 16, 32, 64]
    inputs = []
    for _, members in made:
        inputs.append([window.inputs for window in members])
    assert inputs == [[3, 9], [16, 1], [20, 17], [64]]


@pytest.mark.parametrize(
    "window, policy, divisor, lengths",
    [
        (512, "packed", 1, [512]),
        (512, "isolated", 1, [512, 256, 128, 64]),
        (100, "isolated", 1, [100, 50]),
        (96, "isolated", 32, [96]),
        (48, "isolated", 1, [48]),
    ],
)
def test_padded_lengths(window, policy, divisor, lengths):
    assert padded_lengths(window, policy, divisor) == lengths
