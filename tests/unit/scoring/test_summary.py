"""What scoring says at its end, and that a second run has nothing to do."""

import numpy as np
import pytest

from megatron_slm.data.manifest import check_corpus
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.scoring.summary import finish, means, pending_shards
from megatron_slm.testing.corpora import score_manifest, write_corpus


@pytest.fixture
def store(tmp_path) -> ScoreStore:
    """Ten tokens in shards of four."""
    write_corpus(tmp_path / "c", [[5, 6, 7, 8, 9], [5, 6, 7, 8, 9]])
    manifest = score_manifest(
        check_corpus(tmp_path / "c"), shard_tokens=4, columns=("loss", "margin"), dtype="fp32"
    )
    return ScoreStore.create(tmp_path / "s", manifest)


def write(store: ScoreStore, shard: int) -> None:
    start, end = store.manifest.shard_range(shard)
    values = np.arange(start, end, dtype=np.float32)
    values[values == 0] = np.nan
    store.write_shard(shard, {"loss": values, "margin": -values})


def test_a_share_is_every_nth_unfinished_shard(store):
    assert pending_shards(store, (0, 1)) == [0, 1, 2]
    assert pending_shards(store, (0, 2)) == [0, 2]
    write(store, 1)
    assert pending_shards(store, (1, 2)) == []


def test_means_are_of_tokens_with_a_score_in_finished_shards(store):
    assert means(store) == "no token has a score"
    write(store, 0)
    assert means(store).startswith("mean loss 2.0000 nats over 3 tokens, mean margin -2.0000 over")
    assert finish(store) == "2 of 3 shards are still missing"
    write(store, 1), write(store, 2)
    assert means(store).startswith("mean loss 5.0000 nats over 9 tokens")
    assert finish(store) == "complete"


def test_a_store_that_was_complete_is_not_read_again(store, monkeypatch):
    for shard in range(3):
        write(store, shard)
    finish(store)
    monkeypatch.setattr(ScoreStore, "verify", lambda self: pytest.fail("read again"))
    again = ScoreStore.create(store.folder, store.manifest)
    assert finish(again) == "complete"
