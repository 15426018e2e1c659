"""A second run says what differs from the first, and whether a file or the command is at fault."""

import pytest

from megatron_slm.files.made_from import ChangedFile, refuse_other_origin

MADE_FROM = {"inputs": ["a.jsonl"], "files": "sha256:1", "dtype": "fp32"}


def refused(now: dict) -> ValueError:
    with pytest.raises(ValueError) as caught:
        refuse_other_origin("c.bin", MADE_FROM, now, "Give --overwrite.")
    return caught.value


def test_the_same_origin_is_no_error():
    refuse_other_origin("c.bin", MADE_FROM, dict(MADE_FROM), "Give --overwrite.")


def test_content_that_changed_under_the_same_path_is_a_changed_file():
    error = refused({**MADE_FROM, "files": "sha256:2"})
    assert isinstance(error, ChangedFile)
    assert str(error) == (
        "c.bin exists already, made from other inputs or options:\n"
        "  files: it has 'sha256:1', this command has 'sha256:2'\n"
        "Give --overwrite."
    )


@pytest.mark.parametrize(
    "changed",
    [{"dtype": "bf16"}, {"files": "sha256:2", "inputs": ["b.jsonl"]}, {"shard": [0, 2]}],
)
def test_another_command_is_no_changed_file(changed):
    error = refused({**MADE_FROM, **changed})
    assert not isinstance(error, ChangedFile)
    for name in changed:
        assert f"  {name}: it has" in str(error)


def test_an_unknown_origin_is_no_changed_file():
    with pytest.raises(ValueError, match="nothing says what it was made from") as caught:
        refuse_other_origin("c.bin", None, MADE_FROM, "Give --overwrite.")
    assert not isinstance(caught.value, ChangedFile)
