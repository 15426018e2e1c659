"""A pickle is taken down, never obeyed: no name outside the list, and nothing that the names on it
stand for is called.
"""

import copyreg
import fractions
import os
import pickle
from dataclasses import dataclass

import pytest

from megatron_slm.files.inert_pickle import Record, UnsafeFile, load_inert

HERE = __name__


@dataclass
class Sample:
    """On the lists below."""

    value: object

    def __setstate__(self, state):
        raise AssertionError("the real class must never be given the state")


NAMES = {f"{HERE}.Sample"}


class Planted:
    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize("protocol", (3, 4, 5))
@pytest.mark.parametrize(
    ("function", "arguments", "name"),
    [
        (os.mkdir, ("made",), "posix.mkdir"),
        (eval, ("1/0",), "builtins.eval"),
        (getattr, ("x", "system"), "builtins.getattr"),
        (__import__, ("os",), "builtins.__import__"),
        (copyreg.add_extension, ("os", "system", 7), "copyreg.add_extension"),
        (fractions.Fraction, (1, 2), "fractions.Fraction"),
    ],
)
def test_a_name_outside_the_list_is_refused(
    function, arguments, name, protocol, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    data = pickle.dumps({"deep": [Sample(Planted(function, *arguments))]}, protocol)
    with pytest.raises(UnsafeFile) as refusal:
        load_inert(data, NAMES, "FOLDER/.metadata")
    assert f"FOLDER/.metadata: refused, because it names {name}" in str(refusal.value)
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize("protocol", (0, 1, 2))
def test_so_it_is_in_the_oldest_formats(protocol):
    with pytest.raises(UnsafeFile, match="names __builtin__.eval"):
        load_inert(pickle.dumps(Planted(eval, "1/0"), protocol), NAMES, "F")


@pytest.mark.parametrize("protocol", (3, 4, 5))
def test_an_object_on_the_list_is_taken_down(protocol):
    found = load_inert(pickle.dumps({"a": Sample((1, 2.5, "x", b"y"))}, protocol), NAMES, "F")
    assert found["a"].name == f"{HERE}.Sample"
    assert found["a"].state == {"value": (1, 2.5, "x", b"y")}


def test_a_refusal_is_short_and_moves_no_cursor():
    data = b"\x80\x02c\x1b[2Jos\n" + b"x" * 10_000 + b"\n."
    with pytest.raises(UnsafeFile) as refusal:
        load_inert(data, NAMES, "F")
    assert len(str(refusal.value)) < 500
    assert str(refusal.value).isprintable()


def test_a_function_on_the_list_is_not_called(tmp_path):
    data = pickle.dumps(Planted(os.mkdir, str(tmp_path / "made")))
    found = load_inert(data, {"posix.mkdir"}, "F")
    assert (found.name, found.args) == ("posix.mkdir", (str(tmp_path / "made"),))
    assert not (tmp_path / "made").exists()


def test_known_values_are_handed_out():
    data = pickle.dumps(Planted(fractions.Fraction, 1, 2))
    assert load_inert(data, (), "F", known={"fractions.Fraction": divmod}) == divmod(1, 2)


BUILT_CLASS = b"\x80\x02c" + HERE.encode() + b"\nSample\nN}X\x05\x00\x00\x00valueK\x01s\x86b."
"""Sets an attribute of the class itself: GLOBAL Sample, then BUILD with (None, {"value": 1})."""


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"no pickle",
        pickle.dumps([1, 2, 3])[:-4],
        b"\x80\x02Pidentity\n.",  # an object outside the file
        b"\x80\x02\x82\x07.",  # one of copyreg's registry
        BUILT_CLASS,
    ],
)
def test_what_is_no_record_of_data_is_named_unreadable(data):
    with pytest.raises(ValueError, match="^FOLDER/x: not readable") as refusal:
        load_inert(data, NAMES, "FOLDER/x")
    assert not isinstance(refusal.value, UnsafeFile)
    assert not hasattr(Sample, "value")
    assert not hasattr(Record, "value")
