"""A resumed run tells of Python files that have other content than at the start before."""

from megatron_slm.training import versions
from megatron_slm.training.versions import changed_files, write_versions

PART = "/my parts/lion.py"


def run_files(monkeypatch, *lines: str) -> None:
    monkeypatch.setattr(versions, "loaded_part_files", lambda: list(lines))


def test_a_file_that_has_changed_is_named(tmp_path, monkeypatch):
    run_files(monkeypatch, f"{PART} sha256:aa", "/sink.py sha256:cc")
    write_versions(tmp_path)
    run_files(monkeypatch, f"{PART} sha256:bb", "/sink.py sha256:cc", "/new.py sha256:dd")
    [(sentence, level)] = changed_files(tmp_path)
    assert sentence.startswith(f"file of a part {PART} has changed since")
    assert level == "warning"


def test_the_first_start_has_nothing_to_compare(tmp_path, monkeypatch):
    run_files(monkeypatch, f"{PART} sha256:aa")
    assert changed_files(tmp_path) == []
