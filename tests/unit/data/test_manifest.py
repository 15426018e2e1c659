"""A damaged or foreign corpus never passes the door."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data import verified
from megatron_slm.data.indexed import write_index
from megatron_slm.data.manifest import (
    CorpusManifest,
    check_corpus,
    tokenizer_of,
)
from megatron_slm.files.atomic import write_json_atomically
from megatron_slm.files.hashing import file_sha256
from megatron_slm.testing.corpora import TOKENIZER_FINGERPRINT, write_corpus


def test_corpora_agree_on_how_their_documents_begin_or_nobody_knows(prefix):
    """What an export goes by: one answer for all of a run's corpora, or none."""
    plain = CorpusManifest.read(prefix)
    begun = replace(plain, prepend_bos=True)
    answers = [
        tokenizer_of(blend)["prepend_bos"]
        for blend in ([plain, plain], [begun, begun], [plain, begun])
    ]
    assert answers == [False, True, None]
    assert tokenizer_of([plain])["fingerprint"] == "sha256:aa"


@pytest.fixture
def prefix(tmp_path) -> Path:
    prefix = tmp_path / "c"
    lengths = np.array([3, 1, 4], np.int32)
    np.arange(8, dtype="<u2").tofile(f"{prefix}.bin")
    with open(f"{prefix}.idx", "wb") as stream:
        write_index(stream, np.dtype(np.uint16), lengths)
    CorpusManifest(
        format_version=1,
        documents=3,
        tokens=8,
        token_dtype="uint16",
        bin_bytes=16,
        idx_bytes=34 + 36 + 32,
        bin_sha256=file_sha256(f"{prefix}.bin"),
        idx_sha256=file_sha256(f"{prefix}.idx"),
        tokenizer={
            "path": "v.model",
            "kind": "sentencepiece",
            "fingerprint": "sha256:aa",
            "vocabulary_size": 10,
            "eod_id": 2,
        },
        append_eod=True,
        sources=[],
        created_by={},
        rejected={},
    ).write(prefix)
    return prefix


def test_sound(prefix):
    manifest = check_corpus(prefix, tokenizer={"fingerprint": "sha256:aa"})
    assert manifest.documents == 3
    assert manifest.fingerprint.startswith("sha256:")
    assert (
        json.loads(Path(f"{prefix}.manifest.json").read_text())["fingerprint"]
        == manifest.fingerprint
    )
    assert Path(f"{prefix}.verified.json").exists()


def _truncate(path):
    os.truncate(path, os.path.getsize(path) - 2)


def _extend(path):
    with open(path, "ab") as stream:
        stream.write(b"\0\0")


@pytest.mark.parametrize("suffix", [".bin", ".idx"])
@pytest.mark.parametrize(
    "damage, word", [(_truncate, "truncated"), (_extend, "too long"), (os.unlink, "cannot be read")]
)
def test_wrong_size(prefix, suffix, damage, word):
    check_corpus(prefix)
    damage(f"{prefix}{suffix}")
    with pytest.raises(ValueError, match=word):
        check_corpus(prefix)


@pytest.mark.parametrize("suffix, at", [(".bin", 5), (".idx", 40)])
def test_changed_content_is_found_though_size_is_right(prefix, suffix, at):
    check_corpus(prefix)
    path = Path(f"{prefix}{suffix}")
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)
    with pytest.raises(ValueError):
        check_corpus(prefix)
    with pytest.raises(ValueError):  # nothing was remembered as verified
        check_corpus(prefix)


def test_remembered_stamp_saves_hashing(prefix, monkeypatch):
    check_corpus(prefix)
    monkeypatch.setattr(verified, "hashed", lambda path: pytest.fail("hashed again"))
    check_corpus(prefix)


def test_other_tokenizer(prefix):
    with pytest.raises(ValueError, match="preprocess the text again"):
        check_corpus(prefix, tokenizer={"fingerprint": "sha256:bb"})


def test_a_corpus_whose_documents_another_token_ends_is_refused_with_both(tmp_path):
    write_corpus(tmp_path / "c", [[5, 6, 2]], eod_id=2, bos_id=1)
    same_file = {"fingerprint": TOKENIZER_FINGERPRINT, "path": "theirs.json", "eod_id": 2}
    check_corpus(tmp_path / "c", tokenizer={**same_file, "bos_id": 1})
    check_corpus(tmp_path / "c", tokenizer=same_file)
    with pytest.raises(ValueError, match="not with theirs.json: eod_id 2 and 3; bos_id 1 and None"):
        check_corpus(tmp_path / "c", tokenizer={**same_file, "eod_id": 3, "bos_id": None})


def test_no_manifest_says_how_to_make_one(prefix):
    os.unlink(f"{prefix}.manifest.json")
    with pytest.raises(ValueError, match="--write-manifest"):
        check_corpus(prefix)
    with pytest.raises(ValueError, match="no such corpus"):
        check_corpus(f"{prefix}-none")


@pytest.mark.parametrize(
    "change",
    [
        {"documents": 4},
        {"tokens": 9},
        {"token_dtype": "int32"},
        {"documents": "3"},
        {"extra": 1},
        {"format_version": 9},
        {"tokenizer": {}},
        {"bin_sha256": "00"},
    ],
)
def test_manifest_that_disagrees(prefix, change):
    path = Path(f"{prefix}.manifest.json")
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(ValueError):
        check_corpus(prefix)


@pytest.mark.parametrize("content", ["", "[]", "{", "null", '{"format_version": 1}'])
def test_broken_manifest(prefix, content):
    Path(f"{prefix}.manifest.json").write_text(content)
    with pytest.raises(ValueError):
        check_corpus(prefix)


def test_atomic_write_keeps_the_old_file_on_failure(tmp_path):
    path = tmp_path / "x.json"
    write_json_atomically(path, {"a": 1})
    with pytest.raises(ValueError):
        write_json_atomically(path, {"a": float("nan")})
    with pytest.raises(TypeError):
        write_json_atomically(path, {"a": object()})
    assert json.loads(path.read_text()) == {"a": 1}
    assert os.listdir(tmp_path) == ["x.json"]


def test_a_file_that_changes_while_it_is_hashed_is_refused(prefix, monkeypatch):
    """The bytes hashed may be the right ones and yet not those that training will read."""

    honest = verified.hashed

    def hash_and_meanwhile_write(path):
        found = honest(path)
        with open(path, "r+b") as stream:
            stream.write(b"\xff")
        return found

    monkeypatch.setattr(verified, "hashed", hash_and_meanwhile_write)
    with pytest.raises(ValueError, match="written to while it was being checked"):
        check_corpus(prefix)
    assert not Path(f"{prefix}.verified.json").exists()
