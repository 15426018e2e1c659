"""Every number of the schema has a range; one outside it, NaN and infinity are refused by name."""

import dataclasses
import math
import typing

import pytest

from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.ranges import Range, out_of_range, range_of
from megatron_slm.config.schema import Config
from megatron_slm.config.values import plain, union_members


def number_settings(cls=Config, where=()) -> list[tuple[tuple[str, ...], type, Range | None]]:
    """(path, int or float, range) of every setting that is a number or holds numbers."""
    found = []
    for name, hint in typing.get_type_hints(cls, include_extras=True).items():
        if dataclasses.is_dataclass(hint):
            found += number_settings(hint, (*where, name))
            continue
        members = (
            [hint, *typing.get_args(plain(hint))] if typing.get_origin(hint) is list else [hint]
        )
        for member in (part for one in members for part in union_members(one)):
            if plain(member) in (int, float):
                found.append(((*where, name), plain(member), range_of(member)))
    return found


NUMBERS = number_settings()
NAMES = [".".join(path) for path, _, _ in NUMBERS]


def refusals(path: tuple[str, ...], value) -> list[str]:
    """What `check` says when one setting of a good configuration has this value."""
    config = Config()
    config.data.tokenizer, config.data.train, config.schedule.train_steps = "t.model", ["c"], 10
    *sections, last = path
    target = config
    for section in sections:
        target = getattr(target, section)
    setattr(target, last, [value] if isinstance(getattr(target, last), list) else value)
    with pytest.raises(ConfigError) as caught:
        check_config(config, 1)
    return caught.value.problems


def test_the_schema_has_its_numbers():
    assert {"optimizer.clip_grad_norm", "data.weights", "selection.keep_fraction"} <= set(NAMES)
    assert len(NAMES) > 55


@pytest.mark.parametrize("path, kind, bounds", NUMBERS, ids=NAMES)
def test_every_number_has_a_range_and_is_held_against_it(path, kind, bounds):
    assert bounds, "write a range into its annotation, such as Count or Positive"
    outside = bounds.at_least - 1 if bounds.at_least is not None else bounds.above
    wrong = [outside, 10**40] if kind is int else [outside, math.nan, math.inf, -math.inf]
    for value in wrong:
        problems = refusals(path, value)
        said = [problem for problem in problems if problem.startswith(".".join(path))]
        finite = "" if kind is int or math.isfinite(value) else "a finite number, "
        assert any(f"got {value}; expected {finite}" in problem for problem in said), problems


@pytest.mark.parametrize(
    "path, value, name",
    [
        (("selection", "scorer_options"), {"gamma": math.nan}, "selection.scorer_options.gamma"),
        (
            ("selection", "scorer_options"),
            {"of": [{"w": math.inf}]},
            "selection.scorer_options.of[0].w",
        ),
        (("selection", "keep_fraction"), {"end": math.nan}, "selection.keep_fraction.end"),
        (("selection", "clm_weight"), {"tokens": math.inf}, "selection.clm_weight.tokens"),
    ],
)
def test_numbers_inside_mappings_are_finite(path, value, name):
    assert f"{name}: got" in str(refusals(path, value))
    assert "expected a finite number" in str(refusals(path, value))


def test_nothing_is_out_of_range_by_default():
    assert list(out_of_range(Config())) == []


@pytest.mark.parametrize(
    "bounds, inside, outside, words",
    [
        (Range(at_least=1), [1, 2**63 - 1], [0, 2**63, math.inf], "at least 1"),
        (Range(above=0, at_most=1), [1e-9, 1], [0, 1.1, math.nan], "above 0 and at most 1"),
        (Range(at_least=0, below=1), [0.0, 0.999], [1.0, -0.1], "at least 0 and below 1"),
        (Range(), [-1e300, 5], [math.nan, -math.inf], "a finite number"),
    ],
)
def test_a_range(bounds, inside, outside, words):
    assert all(number in bounds for number in inside)
    assert not any(number in bounds for number in outside)
    assert str(bounds) == words
