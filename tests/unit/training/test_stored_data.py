"""What is read again while a run trains, and what of it counts as damage."""

import os
from itertools import islice
from pathlib import Path

import pytest

from megatron_slm.data import verified
from megatron_slm.data.corpora import open_corpora
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from megatron_slm.training.stored_data import StoredDataCheck, rounds_of_blocks, rounds_of_shards


@pytest.fixture
def corpus(tmp_path, monkeypatch):
    """A corpus of 8 blocks or so, and its scores."""
    monkeypatch.setattr(verified, "SMALLEST_BLOCK_BYTES", 300)
    write_corpus(tmp_path / "text", random_documents(40, 30, vocabulary_size=100))
    write_scores(tmp_path / "scores", tmp_path / "text", lambda offset: offset / 100)
    return open_corpora([str(tmp_path / "text")], [str(tmp_path / "scores")])[0]


def flip(path: Path, at: int, *, keep_times: bool = True) -> None:
    before = path.stat()
    with open(path, "r+b") as stream:
        stream.seek(at)
        byte = stream.read(1)
        stream.seek(at)
        stream.write(bytes([byte[0] ^ 1]))
    if keep_times:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


def one_round(checks, count: int) -> None:
    for check in islice(checks, count):
        check()


def test_every_block_comes_once_in_a_round(corpus):
    blocks = len(verified.StoredBlocks(corpus.prefix))
    assert blocks > 5
    checks = rounds_of_blocks(corpus.prefix)
    one_round(checks, blocks)
    flip(Path(f"{corpus.prefix}.bin"), 310)
    with pytest.raises(ValueError, match="bytes 300 to 600 are no longer"):
        one_round(checks, blocks)


def test_every_shard_comes_once_in_a_round(corpus):
    shards = corpus.scores.manifest.shard_count
    checks = rounds_of_shards(corpus.scores)
    one_round(checks, shards)
    flip(corpus.scores.column_path("loss"), 5)
    with pytest.raises(ValueError, match=r"scores.loss.bin: the scores of tokens 0 to "):
        one_round(checks, shards)


def test_files_that_were_replaced_or_removed_are_left_out(corpus):
    """The run reads on what it has opened; the next start compares."""
    blocks, shards = rounds_of_blocks(corpus.prefix), rounds_of_shards(corpus.scores)
    flip(Path(f"{corpus.prefix}.bin"), 310, keep_times=False)
    one_round(blocks, 20)
    column = corpus.scores.column_path("loss")
    column.rename(column.with_suffix(".old"))
    column.write_bytes(column.with_suffix(".old").read_bytes()[::-1])
    one_round(shards, corpus.scores.manifest.shard_count)


def test_a_file_that_cannot_be_looked_at_now_ends_nothing(corpus):
    checks = StoredDataCheck([corpus], 1)
    Path(f"{corpus.prefix}.bin").unlink()
    for each in checks._rounds:
        checks._run_next(each)
    assert checks.fault() is None


def test_the_first_damage_is_kept(corpus):
    checks = StoredDataCheck([corpus], 1)
    flip(corpus.scores.column_path("loss"), 5)
    [_, shards] = checks._rounds
    for _ in range(corpus.scores.manifest.shard_count):
        checks._run_next(shards)
    assert "(shard 0) are not the bytes that were written" in str(checks.fault())


@pytest.mark.parametrize("local_rank, seconds", [("1", 1), ("0", 0)])
def test_only_the_first_process_of_a_node_reads_and_only_when_asked(
    corpus, monkeypatch, local_rank, seconds
):
    monkeypatch.setenv("LOCAL_RANK", local_rank)
    with StoredDataCheck([corpus], seconds) as checks:
        assert checks._thread is None
