"""Names and files that came with somebody else's folder: its own plain files, and nothing else of
the machine.
"""

import os

import pytest

from megatron_slm.files.plain import LeadsOutside, is_plain_name, plain_file, read_json_object


@pytest.mark.parametrize(
    "name", ["../../x", "/etc/passwd", "/dev/zero", "..", ".", "", "a/b", "a\\b", "a\0b", None, 3]
)
def test_a_name_that_leads_elsewhere_is_refused(name, tmp_path):
    assert not is_plain_name(name)
    with pytest.raises(LeadsOutside, match="leads out of the folder"):
        plain_file(tmp_path, name)


@pytest.mark.parametrize("name", [".metadata", "__0_0.distcp", "model.json", "..double", "a b"])
def test_a_plain_name_is_a_name(name):
    assert is_plain_name(name)


def make_link(path):
    path.symlink_to("/dev/zero")


def make_link_to_a_file(path):
    (path.parent / "elsewhere").write_text("{}")
    path.symlink_to(path.parent / "elsewhere")


@pytest.mark.parametrize("make", [make_link, make_link_to_a_file, os.mkfifo, os.mkdir])
def test_what_is_no_plain_file_is_not_opened(make, tmp_path):
    make(tmp_path / "model.json")
    with pytest.raises(ValueError, match="model.json: is no plain file"):
        read_json_object(tmp_path, "model.json")


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match="model.json: cannot be read"):
        plain_file(tmp_path, "model.json")


@pytest.mark.parametrize("content", [b"{", b"\xff", b"[" * 100_000, b"[1]", b"3"])
def test_what_is_no_json_object_is_refused_in_a_sentence(content, tmp_path):
    (tmp_path / "model.json").write_bytes(content)
    with pytest.raises(ValueError, match="model.json: (not readable|expected a JSON object)"):
        read_json_object(tmp_path, "model.json")


def test_a_json_object_is_read(tmp_path):
    (tmp_path / "model.json").write_text('{"a": 1}')
    assert read_json_object(tmp_path, "model.json") == {"a": 1}
