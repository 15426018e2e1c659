"""A loss that jumps is told once; noise, a falling loss and another measure are not."""

import json
import random

import pytest

from megatron_slm.monitoring.loss_spikes import LossSpikes


def told(losses, spikes=None, name="loss/all", keep_fractions=None):
    """Steps at which the alarm spoke."""
    spikes = spikes or LossSpikes()
    keep_fractions = keep_fractions or [0.6] * len(losses)
    found = [
        spikes.look({name: loss}, keep, step)
        for step, (loss, keep) in enumerate(zip(losses, keep_fractions, strict=True))
    ]
    return [step for step, sentence in enumerate(found) if sentence]


def noisy(level, count, spread=0.05, seed=0):
    chance = random.Random(seed)
    return [level + chance.gauss(0, spread) for _ in range(count)]


def test_a_learning_rate_that_is_far_too_high_is_told_at_the_first_line():
    assert told([*noisy(5, 20), 9.0, 14.0, 19.0]) == [20]


def test_the_sentence_has_the_numbers_and_what_to_do():
    spikes = LossSpikes()
    told([5.0] * 12, spikes)
    sentence = spikes.look({"loss/all": 9.0}, 0.6, 240)
    for part in ("loss/all", "9.000 nats at step 240", "median of 5.000", "learning_rate"):
        assert part in sentence


@pytest.mark.parametrize("spread", [0.01, 0.05, 0.3])
def test_noise_is_no_spike(spread):
    assert [seed for seed in range(20) if told(noisy(3, 300, spread, seed))] == []


def test_a_falling_loss_is_no_spike():
    noise = noisy(0, 300)
    assert told([3 + 7 * 0.97**step + noise[step] for step in range(300)]) == []


def test_a_rise_is_no_spike_before_there_is_a_history():
    assert told([5.0] * 9 + [19.0]) == []


def test_a_quiet_loss_may_move_a_little():
    assert told([5.0] * 30 + [5.09]) == []
    assert told([5.0] * 30 + [5.11]) == [30]


def test_a_second_spike_is_told_when_the_first_is_over():
    back = noisy(3, 20, seed=1)
    assert told([*noisy(3, 20), 6.0, 6.1, *back, 6.0]) == [20, 42]


def test_a_loss_that_stays_high_is_told_once_and_becomes_what_is_usual():
    assert told([*noisy(3, 60), *noisy(6, 60), 9.0]) == [60, 120]


def test_without_the_loss_of_all_tokens_the_selected_ones_count():
    assert told([*noisy(5, 20), 9.0], name="loss/selected") == [20]


def test_keeping_fewer_tokens_is_no_spike():
    losses, keep_fractions = [*noisy(2, 20), *noisy(4, 20)], [1.0] * 20 + [0.6] * 20
    assert told(losses, name="loss/selected", keep_fractions=keep_fractions) == []
    assert told(losses, keep_fractions=keep_fractions) == [20]


@pytest.mark.parametrize("summary", [{}, {"loss/all": float("nan")}, {"loss/all": float("inf")}])
def test_a_line_without_a_loss_changes_nothing(summary):
    spikes = LossSpikes()
    told([5.0] * 12, spikes)
    before = json.dumps(spikes.state_dict())
    assert spikes.look(summary, 0.6, 12) is None
    assert json.dumps(spikes.state_dict()) == before


@pytest.mark.parametrize("cut", [5, 15, 21, 30])
def test_a_resumed_run_warns_as_an_uninterrupted_one(cut):
    losses = [*noisy(3, 20), 6.0, 6.1, *noisy(3, 20, seed=1), 6.0]
    first, second = LossSpikes(), LossSpikes()
    before = told(losses[:cut], first)
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [cut + step for step in told(losses[cut:], second)] == told(losses)


def test_a_checkpoint_from_before_the_alarm_can_be_resumed():
    spikes = LossSpikes()
    spikes.load_state_dict({})
    assert told([*noisy(5, 20), 9.0], spikes) == [20]
