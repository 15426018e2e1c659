"""What is remembered of a corpus's files once they were hashed: PREFIX.verified.json.

A file whose stamp (size, times, inode) is the remembered one is not hashed again. Checksums of its
blocks are remembered too, so that a few blocks can be checked at every start: a disk may lose bytes
that it once read correctly.
"""

import contextlib
import hashlib
import json
import os
import random
import zlib
from pathlib import Path
from typing import Any

from megatron_slm.files.atomic import write_json_atomically

BLOCKS_AT_MOST = 4096
SMALLEST_BLOCK_BYTES = 1 << 20
PIECE_BYTES = 1 << 20


def check_content(prefix: str | Path, expected_sha256: dict[str, str]) -> None:
    """Hash the files PREFIX + suffix that have changed since they were last hashed.

    ValueError when one is not what `expected_sha256` says, or is written to while it is hashed.
    """
    remembered = _remembered(prefix)
    verified = {}
    for suffix, sha256 in expected_sha256.items():
        path = Path(f"{prefix}{suffix}")
        before = _stamp(path)
        known = remembered.get(suffix)
        if isinstance(known, dict):
            noted = (known.get("stamp"), known.get("sha256"))
            if noted == (before, sha256):
                verified[suffix] = known
                continue
        hashes = hashed(path)
        verified[suffix] = {"stamp": before, **hashes}
        if _stamp(path) != before:
            raise ValueError(
                f"{path}: the file was written to while it was being checked. Wait until whatever "
                "writes it has ended, then start again."
            )
        if hashes["sha256"] != sha256:
            raise ValueError(
                f"{path}: the content has changed since the corpus was made (sha256 "
                f"{hashes['sha256'][:16]}…, its manifest says {sha256[:16]}…). Copy it again, or "
                "make the corpus again."
            )
    if verified != remembered:
        with contextlib.suppress(OSError):  # a read-only folder: the next check hashes again
            write_json_atomically(_cache_path(prefix), verified)


def check_sample(prefix: str | Path, blocks: int) -> int:
    """Read `blocks` random blocks of PREFIX.bin again. Returns how many; 0 = no checksums are kept.

    ValueError names the bytes that are no longer what they were when the file was hashed.
    """
    stored = StoredBlocks(prefix)
    # Not Python's global generator: its state is part of a run's.
    chosen = random.SystemRandom().sample(range(len(stored)), min(blocks, len(stored)))
    for number in chosen:
        stored.check(number)
    return len(chosen)


class StoredBlocks:
    """The blocks of PREFIX.bin, with their checksums from when the file was hashed; none where
    no checksums are kept, or where those that are kept are of a file of another size or time.
    """

    def __init__(self, prefix: str | Path):
        self.path = Path(f"{prefix}.bin")
        size_bytes, modified_ns, *_ = _stamp(self.path)
        self._block_bytes = _block_bytes(size_bytes)
        known = _remembered(prefix).get(".bin")
        sums = None
        stamp = None
        if isinstance(known, dict):
            sums = known.get("block_crc32")
            stamp = known.get("stamp")
        # A copy that keeps size and time is the same file, so the inode is not compared.
        if not isinstance(stamp, list) or stamp[:2] != [size_bytes, modified_ns]:
            sums = None
        if not isinstance(sums, list) or len(sums) != -(-size_bytes // self._block_bytes):
            sums = []
        self._sums: list[int] = sums
        self._written_at = self._file_now()

    def __len__(self) -> int:
        return len(self._sums)

    def check(self, number: int) -> None:
        """ValueError where a block, read from the disk, is no longer what it was."""
        start = number * self._block_bytes
        end = start + self._block_bytes
        forget_cached(self.path, start, self._block_bytes)
        crc32 = 0
        with open(self.path, "rb") as stream:
            stream.seek(start)
            while piece := stream.read(min(PIECE_BYTES, end - stream.tell())):
                crc32 = zlib.crc32(piece, crc32)
        if crc32 != self._sums[number]:
            raise ValueError(
                f"{self.path}: bytes {start:,} to {end:,} are no longer what they were when the "
                "file was hashed, and its times are unchanged: the disk has lost them. Copy it "
                "again, or make the corpus again."
            )

    def is_the_same_file(self) -> bool:
        """Whether the file has not been removed, replaced or written to since it was opened
        here.
        """
        try:
            return self._file_now() == self._written_at
        except OSError:
            return False

    def _file_now(self) -> tuple[int, int, int]:
        status = self.path.stat()
        return status.st_size, status.st_mtime_ns, status.st_ino


def forget_cached(path: Path, start_bytes: int, count_bytes: int) -> None:
    """Drop a range from the page cache, so that the next read of it comes from the disk."""
    with open(path, "rb") as stream:
        os.posix_fadvise(stream.fileno(), start_bytes, count_bytes, os.POSIX_FADV_DONTNEED)


def hashed(path: Path) -> dict[str, Any]:
    """sha256 of the whole file, and crc32 of each of its blocks."""
    block_bytes = _block_bytes(path.stat().st_size)
    whole = hashlib.sha256()
    sums = []
    with open(path, "rb") as stream:
        left_bytes = block_bytes
        crc32 = 0
        while piece := stream.read(min(PIECE_BYTES, left_bytes)):
            whole.update(piece)
            crc32 = zlib.crc32(piece, crc32)
            left_bytes -= len(piece)
            if left_bytes == 0:
                sums.append(crc32)
                left_bytes = block_bytes
                crc32 = 0
        if left_bytes < block_bytes:
            sums.append(crc32)
    return {"sha256": whole.hexdigest(), "block_crc32": sums}


def _block_bytes(size_bytes: int) -> int:
    return max(SMALLEST_BLOCK_BYTES, -(-size_bytes // BLOCKS_AT_MOST))


def _remembered(prefix: str | Path) -> dict[str, Any]:
    try:
        remembered = json.loads(_cache_path(prefix).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return remembered if isinstance(remembered, dict) else {}


def _cache_path(prefix: str | Path) -> Path:
    return Path(f"{prefix}.verified.json")


def _stamp(path: Path) -> list[int]:
    status = path.stat()
    return [status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino]
