"""A configuration that passes every check, and what is wrong with it after changes."""

import pytest

from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config


@pytest.fixture()
def good():
    """Makes configurations that a run could start with."""

    def make() -> Config:
        config = Config()
        config.data.tokenizer = "t.model"
        config.data.train = ["c"]
        config.schedule.train_steps = 10
        return config

    return make


@pytest.fixture()
def problems_after(good):
    """Problems of a good configuration after `section__field=value` changes."""

    def problems(world_size: int = 1, **changes) -> list[str]:
        config = good()
        for name, value in changes.items():
            *path, last = name.split("__")
            target = config
            for part in path:
                target = getattr(target, part)
            setattr(target, last, value)
        with pytest.raises(ConfigError) as caught:
            check_config(config, world_size)
        return caught.value.problems

    return problems


@pytest.fixture()
def breaks_a_rule(problems_after):
    """Asserts that changes give a problem of `field` with the value got and the remedy."""

    def check(field: str, changes: dict, got: str, remedy: str) -> None:
        problems = problems_after(**changes)
        of_field = [problem for problem in problems if problem.startswith(field)]
        assert any(got in problem and remedy in problem for problem in of_field), problems

    return check
