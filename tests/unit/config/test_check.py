"""The check as a whole: what passes, several problems at once, sizes of zero; sizes that follow.

Each rule has its own case in test_layout_rules.py and test_training_rules.py.
"""

import pytest

from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError, from_mapping, to_mapping
from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import data_parallel_size, tokens_per_step, train_steps


def test_a_good_configuration_passes(good):
    check_config(good(), 1)
    config = good()
    config.parallel.tensor = 2
    config.parallel.pipeline = 2
    config.parallel.sequence = True
    check_config(config, 8)


def test_programs_that_do_not_train_need_no_data():
    check_config(Config(), 1, training=False)
    with pytest.raises(ConfigError):
        check_config(Config(), 1)


def test_all_rules_speak_at_once(problems_after):
    problems = problems_after(
        model__attention_heads=3,
        optimizer__beta1=2.0,
        data__train=[],
        schedule__train_steps=0,
        monitoring__log_interval_steps=0,
    )
    assert {problem.split(":")[0] for problem in problems} >= {
        "model.hidden_size",
        "optimizer.beta1",
        "data.train",
        "schedule",
        "monitoring.log_interval_steps",
    }


@pytest.mark.parametrize("value", [0, -1])
@pytest.mark.parametrize(
    "name",
    [
        "model.layers",
        "model.attention_heads",
        "model.hidden_size",
        "model.ffn_hidden_size",
        "parallel.tensor",
        "parallel.pipeline",
        "parallel.context",
        "parallel.virtual_pipeline",
        "data.sequence_length",
        "data.micro_batch_size",
        "data.global_batch_size",
    ],
)
def test_sizes_below_one_are_problems_and_never_crash_the_check(name, value, good):
    """A zero must be reported, not divided by."""
    section, field = name.split(".")
    config, problems = from_mapping(
        {**to_mapping(good()), section: {**to_mapping(good())[section], field: value}}
    )
    assert not problems
    with pytest.raises(ConfigError, match=name.replace(".", r"\.")):
        check_config(config, 1)


def test_sizes_that_follow_from_the_configuration(good):
    config = good()
    config.parallel.tensor = 2
    config.parallel.pipeline = 2
    config.data.global_batch_size = 16
    config.data.sequence_length = 100
    assert data_parallel_size(config, 16) == 4
    assert tokens_per_step(config) == 1600
    assert train_steps(config) == 10
    config.schedule.train_steps = 0
    config.schedule.train_tokens = 1601
    assert train_steps(config) == 2  # rounded up to whole steps
