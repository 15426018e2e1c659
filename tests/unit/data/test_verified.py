"""Blocks of a corpus that are read again: damage that leaves a file's times alone is found."""

import hashlib
import json
import os
import zlib
from pathlib import Path

import pytest

from megatron_slm.data import verified
from megatron_slm.data.manifest import check_corpus
from megatron_slm.data.verified import check_sample, hashed
from megatron_slm.testing.corpora import random_documents, write_corpus


@pytest.fixture
def prefix(tmp_path, monkeypatch):
    monkeypatch.setattr(verified, "SMALLEST_BLOCK_BYTES", 300)
    monkeypatch.setattr(verified, "PIECE_BYTES", 128)
    write_corpus(tmp_path / "text", random_documents(40, 30, vocabulary_size=100))
    check_corpus(tmp_path / "text")
    return tmp_path / "text"


def test_every_block_has_its_checksum(prefix):
    content = Path(f"{prefix}.bin").read_bytes()
    found = hashed(Path(f"{prefix}.bin"))
    assert found["sha256"] == hashlib.sha256(content).hexdigest()
    starts = range(0, len(content), 300)
    assert found["block_crc32"] == [zlib.crc32(content[at : at + 300]) for at in starts]


def test_whole_blocks_are_read_again(prefix):
    blocks = -(-Path(f"{prefix}.bin").stat().st_size // 300)
    assert check_sample(prefix, 2) == 2
    assert check_sample(prefix, 1000) == blocks


def lose_bytes(path: Path) -> None:
    """As a disk does it: the file's times stay what they were."""
    before = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(310)
        stream.write(bytes(20))
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_a_lost_block_is_named(prefix):
    lose_bytes(Path(f"{prefix}.bin"))
    with pytest.raises(ValueError, match=r"text.bin: bytes 300 to 600 are no longer"):
        check_sample(prefix, 1000)


def test_checksums_of_another_file_are_not_used(prefix):
    """The corpus was made again, and the note of the earlier one was left in the folder."""
    stale = Path(f"{prefix}.verified.json").read_text()
    write_corpus(prefix, random_documents(40, 30, vocabulary_size=90))
    os.utime(f"{prefix}.bin", (0, 0))  # clocks of file systems are coarse
    Path(f"{prefix}.verified.json").write_text(stale)
    assert check_sample(prefix, 1000) == 0


@pytest.mark.parametrize("kept", [None, [], {".bin": 3}, {".bin": {"block_crc32": [1]}}])
def test_without_checksums_nothing_is_read(prefix, kept):
    """Verified by an earlier version, in a folder that cannot be written, or by a stranger."""
    cache = Path(f"{prefix}.verified.json")
    cache.write_text(json.dumps(kept))
    assert check_sample(prefix, 5) == 0
    cache.unlink()
    assert check_sample(prefix, 5) == 0


def test_an_empty_file_has_no_block(tmp_path):
    (tmp_path / "none").touch()
    assert hashed(tmp_path / "none")["block_crc32"] == []
