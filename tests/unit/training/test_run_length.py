"""Steps, tokens and samples of a run whose batch or sequence length is another than before, and its
learning rate.
"""

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.training.learning_rate import learning_rate
from megatron_slm.training.run_length import Done, RunLength, shorter_than_done

S = 8


def config_of(batch: int, sequence_length: int = S, **schedule) -> Config:
    config = Config()
    config.data.global_batch_size, config.data.sequence_length = batch, sequence_length
    for name, value in schedule.items():
        setattr(config.schedule, name, value)
    return config


def trained(config: Config, done: Done | None = None, steps: int | None = None) -> Done:
    done = done or Done()
    length = RunLength(config, done)
    for _ in range(length.remaining_steps if steps is None else steps):
        done = length.after(done)
    return done


def test_more_steps_of_a_smaller_batch_are_planned_after_the_samples_already_read():
    """20 steps of 32, then up to 60 of 8: 640 samples are read, 320 are to come."""
    done = trained(config_of(32, train_steps=20))
    length = RunLength(config_of(8, train_steps=60), done)
    assert (done.samples, length.remaining_samples) == (640, 320)
    assert (length.steps, length.tokens) == (60, 960 * S)
    assert trained(config_of(8, train_steps=60), done) == Done(60, 960 * S, 960)


@pytest.mark.parametrize(
    "batch, sequence_length, steps, tokens",
    [(12, S, 7, 672), (4, S, 20, 640), (32, 2 * S, 2, 1024), (7, S, 12, 672)],
)
def test_the_tokens_that_remain_are_trained_whatever_the_step_has(
    batch, sequence_length, steps, tokens
):
    """Half of 1280 tokens are done in 40 steps of 2 sequences; the run ends with the first step
    that reaches 1280.
    """
    done = trained(config_of(2, train_tokens=1280), steps=40)
    assert done == Done(40, 640, 80)
    length = RunLength(config_of(batch, sequence_length, train_tokens=1280), done)
    assert (length.steps, length.tokens) == (40 + steps, 640 + tokens)


def rates(config: Config, done: Done, steps: int) -> list[float]:
    length, found = RunLength(config, done), []
    for _ in range(steps):
        done = length.after(done)
        found.append(learning_rate(config, *length.clock(done)))
    return found


@pytest.mark.parametrize("style", ["linear", "cosine", "wsd"])
def test_with_tokens_the_learning_rate_goes_on_from_the_tokens_processed(style):
    """50 of 100 steps done, the batch a quarter: four steps now go as far as one did."""
    settings = dict(train_tokens=100 * 4 * S, style=style, decay_fraction=0.6)
    large, small = config_of(4, **settings), config_of(1, **settings)
    done = trained(large, steps=50)
    assert rates(small, done, 200)[3::4] == pytest.approx(rates(large, done, 50))


def test_with_steps_the_learning_rate_goes_on_from_the_steps_done():
    settings = dict(train_steps=100, style="cosine")
    large, small = config_of(4, **settings), config_of(1, **settings)
    done = trained(large, steps=50)
    assert rates(small, done, 50) == rates(large, done, 50)


def test_an_unchanged_run_has_the_same_curve_in_tokens_and_in_steps():
    in_steps, in_tokens = config_of(3, train_steps=10), config_of(3, train_tokens=10 * 3 * S - 5)
    assert rates(in_steps, Done(), 10) == rates(in_tokens, Done(), 10)
    assert rates(in_tokens, Done(), 10)[4:] == rates(in_tokens, trained(in_tokens, steps=4), 6)


def test_a_finished_run_has_nothing_left_and_a_shorter_one_is_refused():
    """Finished in 3 steps of 64 tokens: 150 to 192 tokens end with the same step, 128 tokens and 2
    steps before it.
    """
    done = trained(config_of(8, train_tokens=150))
    assert done == Done(3, 192, 24)
    for schedule in (dict(train_steps=3), dict(train_tokens=192), dict(train_tokens=129)):
        config = config_of(1, **schedule)
        assert RunLength(config, done).remaining_steps == 0
        assert shorter_than_done(config, done, 64) is None
    for schedule, words in (
        (dict(train_steps=2), "schedule.train_steps: got 2"),
        (dict(train_tokens=128), "schedule.train_tokens: got 128"),
    ):
        said = shorter_than_done(config_of(8, **schedule), done, 64)
        assert words in said
        assert "has done 3 steps (192 tokens)" in said
