"""Every annotation of the schema is checked, however it is written; others are refused at once."""

import dataclasses
import typing
from typing import Annotated, Any, Literal, Optional, Union

import pytest

from megatron_slm.config import load
from megatron_slm.config.load import from_mapping, parse_config
from megatron_slm.config.schema import Config
from megatron_slm.config.values import UNREADABLE, convert, require_known


def converted(value, hint):
    problems = []
    result = convert(value, hint, "setting", problems)
    assert (result is UNREADABLE) == bool(problems)
    return problems[0] if problems else result


@pytest.mark.parametrize(
    "hint",
    [int | None, Optional[int], Union[int, None], Annotated[int | None, "x"]],  # noqa: UP007, UP045
)
def test_a_union_is_checked_however_it_is_written(hint):
    assert converted("12", hint) == 12
    assert converted(None, hint) is None
    assert converted("many", hint) == "setting: got 'many' (str); expected a whole number or null"


@pytest.mark.parametrize(
    "hint",
    [float | dict[str, Any], Union[Annotated[float, "x"], dict[str, Any]]],  # noqa: UP007
)
def test_a_number_or_a_mapping(hint):
    assert converted("1e-4", hint) == 1e-4
    assert converted({"style": "linear"}, hint) == {"style": "linear"}
    assert converted([1], hint) == "setting: got [1] (list); expected a number or a mapping"


def test_members_of_a_list_are_checked_as_their_annotation_says():
    assert converted(["1", None], list[int | None]) == [1, None]
    assert "expected a list of whole numbers" in converted([1, "x"], list[Annotated[int, "x"]])
    assert "expected a list" in converted(["c"], list[Literal["a", "b"]])


def test_an_option_value_that_is_nearly_right_names_the_right_one():
    assert converted("cosin", Literal["linear", "cosine"]).startswith(
        "setting: got 'cosin'; did you mean cosine? (it can be linear, cosine)"
    )
    assert converted(False, Literal["off", "none"]).endswith("; it can be off, none")


def test_a_large_whole_number_keeps_every_digit():
    assert converted("9007199254740993", int) == 9007199254740993
    assert converted("9_007_199_254_740_993", int) == 9007199254740993


@pytest.mark.parametrize(
    "hint", [tuple[int, ...], dict, dict[str, int], set[str], Any, complex, list]
)
def test_an_annotation_that_cannot_be_checked_is_refused_at_once(hint):
    with pytest.raises(TypeError, match="section.field: its annotation"):
        require_known(hint, "section.field")
    with pytest.raises(TypeError):
        convert("1", hint, "section.field", [])


def test_a_schema_with_such_an_annotation_is_refused_though_nobody_sets_the_field(monkeypatch):
    @dataclasses.dataclass
    class Unchecked:
        number: complex = 0

    monkeypatch.setattr(load, "Config", Unchecked)
    with pytest.raises(TypeError, match="number: its annotation"):
        from_mapping({})


def test_every_annotation_of_the_schema_is_checked():
    """A value of no known type is refused by every field."""
    assert from_mapping({}) == (Config(), [])
    seen = 0
    for section, section_hint in typing.get_type_hints(Config).items():
        for field in dataclasses.fields(section_hint):
            _, problems = from_mapping({section: {field.name: object()}})
            assert problems, f"{section}.{field.name} takes any value"
            seen += 1
    assert seen > 80


@pytest.mark.parametrize("text", ["007", "2026-01-31", "yes"])
def test_text_that_may_be_null_is_taken_as_it_is_too(text):
    assert (
        parse_config(
            ["--selection.reference.checkpoint", text], "t", ""
        ).selection.reference.checkpoint
        == text
    )
    assert (
        parse_config(
            ["--selection.reference.checkpoint", "null"], "t", ""
        ).selection.reference.checkpoint
        is None
    )
