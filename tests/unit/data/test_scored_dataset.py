"""Every token's score is that token's: the fake scores are the absolute offsets, so alignment is an
equality.
"""

import math
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings, strategies
from megatron.core.datasets.gpt_dataset import GPTDataset
from megatron.core.datasets.indexed_dataset import IndexedDataset

from megatron_slm.data.blend import blend
from megatron_slm.data.corpora import nothing_counts
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.data.scored_dataset import (
    ScoredDataset,
    open_corpora,
    training_dataset,
    validation_dataset,
)
from megatron_slm.testing.corpora import (
    random_documents,
    score_manifest,
    write_corpus,
    write_scores,
)


def make(folder, name, count=60, mean=20, seed=0, **scores):
    documents = random_documents(count, mean, seed=seed)
    write_corpus(folder / name, documents)
    write_scores(folder / f"{name}_scores", folder / name, **scores)
    return documents


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    return folder, {
        name: make(folder, name, count=count, seed=number)
        for number, (name, count) in enumerate((("a", 60), ("b", 25), ("c", 110)))
    }


def opened(folder, names="a"):
    prefixes = [str(folder / name) for name in names]
    return open_corpora(prefixes, [f"{prefix}_scores" for prefix in prefixes])


def check_sample(sample, documents, sequence_length):
    """Token, label, score and mask of every position against the documents themselves."""
    flat = np.concatenate(documents)
    starts = np.cumsum([0] + [len(document) for document in documents[:-1]])
    real = sample["offsets"] >= 0
    assert sample["tokens"].shape == sample["labels"].shape == (sequence_length,)
    np.testing.assert_array_equal(sample["labels"][real], flat[sample["offsets"][real]])
    np.testing.assert_array_equal(sample["tokens"][1:][real[1:]], sample["labels"][:-1][real[1:]])
    first = np.isin(sample["offsets"], starts)
    np.testing.assert_array_equal(sample["loss_mask"], (real & ~first).astype(np.float32))
    scored = real & ~first
    np.testing.assert_array_equal(sample["reference_loss"][scored], sample["offsets"][scored])
    assert np.isnan(sample["reference_loss"][~scored]).all()


@settings(max_examples=25, deadline=None)
@given(
    sequence_length=strategies.integers(2, 90),
    seed=strategies.integers(0, 2**31),
    weights=strategies.lists(strategies.floats(0.05, 5), min_size=3, max_size=3),
)
def test_scores_belong_to_their_tokens_whatever_the_length_seed_and_blend(
    data, sequence_length, seed, weights
):
    """docs/method.md#point-12, over several epochs of every corpus of a blend."""
    folder, documents = data
    dataset = training_dataset(
        opened(folder, "abc"),
        sequence_length=sequence_length,
        seed=seed,
        samples=3000,
        weights=weights,
        with_offsets=True,
    )
    for index in np.random.RandomState(seed % 2**31).randint(0, 3000, 40):
        sample = dataset[index]
        check_sample(sample, documents["abc"[int(sample["corpus_id"])]], sequence_length)


def test_score_and_label_are_the_same_slice(data):
    """docs/method.md#point-11: score[i] is of token i; labels and scores are [1:] of a sample."""
    folder, documents = data
    dataset = training_dataset(opened(folder), sequence_length=31, seed=1, samples=10)
    flat_of_scores = np.concatenate(documents["a"])
    sample = dataset[3]
    scored = ~np.isnan(sample["reference_loss"])
    np.testing.assert_array_equal(
        flat_of_scores[sample["reference_loss"][scored].astype(int)], sample["labels"][scored]
    )


def test_isolated_documents_begin_where_the_first_tokens_are(data):
    """Positions restart at each document, whose first token is the one that is masked as a label;
    padding belongs to the last document.
    """
    folder, _ = data
    settings_ = dict(sequence_length=47, with_offsets=True)
    packed, isolated = (
        validation_dataset(opened(folder)[0], **settings_, isolate_documents=isolate)
        for isolate in (False, True)
    )
    for index in range(len(packed)):
        sample = isolated[index]
        plain = packed[index]
        assert plain.keys() == sample.keys() - {"document_start"}
        for name in plain.keys() - {"position_ids"}:
            np.testing.assert_array_equal(sample[name], plain[name])
        first = (
            np.flatnonzero((plain["loss_mask"] == 0) & (plain["offsets"] >= 0)) + 1
        )  # of inputs: the label before them was masked
        begins = np.array([0, *first[first < 47]])
        np.testing.assert_array_equal(
            sample["document_start"],
            begins[np.searchsorted(begins, np.arange(47), side="right") - 1],
        )
        np.testing.assert_array_equal(
            sample["position_ids"], np.arange(47) - sample["document_start"]
        )


def test_first_token_of_a_document_is_not_eligible(data):
    """docs/method.md#point-14: masked as a label, kept as an input, with and without scores."""
    folder, documents = data
    starts = set(np.cumsum([0] + [len(document) for document in documents["a"][:-1]]).tolist())
    plain = training_dataset(
        open_corpora([str(folder / "a")]), sequence_length=64, seed=3, samples=10, with_offsets=True
    )
    scored = training_dataset(
        opened(folder), sequence_length=64, seed=3, samples=10, with_offsets=True
    )
    for index in range(len(plain)):
        masked = {
            int(offset)
            for offset, mask in zip(plain[index]["offsets"], plain[index]["loss_mask"], strict=True)
            if mask == 0
        }
        assert masked == starts & set(plain[index]["offsets"].tolist())
        np.testing.assert_array_equal(plain[index]["loss_mask"], scored[index]["loss_mask"])
        assert "reference_loss" not in plain[index]


def test_tokens_are_those_of_megatron_core(data):
    """pieces() walks the documents exactly as GPTDataset does with the same three arrays."""
    folder, _ = data
    dataset = ScoredDataset(opened(folder)[0], sequence_length=23, seed=5)
    epoch = dataset.order.epoch(0)
    theirs = SimpleNamespace(
        dataset=IndexedDataset(str(folder / "a")),
        document_index=epoch.document_index,
        sample_index=epoch.sample_index,
        shuffle_index=epoch.shuffle_index,
        config=SimpleNamespace(add_extra_token_to_sequence=True, sequence_length=23),
    )
    for index in range(len(dataset)):
        tokens, *_ = GPTDataset._query_document_sample_shuffle_indices(theirs, index)
        sample = dataset[index]
        np.testing.assert_array_equal(np.append(sample["tokens"], sample["labels"][-1]), tokens)


def test_an_epoch_reads_every_token_at_most_once_and_epochs_differ(data):
    folder, documents = data
    dataset = training_dataset(
        opened(folder), sequence_length=16, seed=2, samples=10, with_offsets=True
    )
    samples = len(dataset)
    epochs = []
    for first in (0, samples, 2 * samples):
        epochs.append(
            np.concatenate([dataset[i]["offsets"] for i in range(first, first + samples)])
        )
    total = sum(map(len, documents["a"]))
    for offsets in epochs:
        assert len(set(offsets.tolist())) == len(offsets) == (total - 1) // 16 * 16
    assert not np.array_equal(epochs[0], epochs[1])
    assert not np.array_equal(epochs[1], epochs[2])
    np.testing.assert_array_equal(
        dataset[0]["offsets"], epochs[0][:16]
    )  # an earlier epoch is found again


def test_a_longer_run_continues_the_shorter_one(data):
    """The order depends on (seed, epoch) and the blend on (weights, i): never on how many samples
    were planned.
    """
    folder, _ = data
    short, long = (
        training_dataset(
            opened(folder, "abc"),
            sequence_length=16,
            seed=4,
            samples=samples,
            weights=[6, 3, 1],
            with_offsets=True,
        )
        for samples in (120, 700)
    )
    for index in range(120):
        np.testing.assert_array_equal(short[index]["offsets"], long[index]["offsets"])
        assert short[index]["corpus_id"] == long[index]["corpus_id"]
    other_seed = training_dataset(
        opened(folder, "abc"),
        sequence_length=16,
        seed=5,
        samples=120,
        weights=[6, 3, 1],
        with_offsets=True,
    )
    assert any(
        not np.array_equal(short[index]["offsets"], other_seed[index]["offsets"])
        for index in range(3)
    )


def test_blend_follows_its_weights():
    index = blend([6, 3, 1], 1000)
    assert [int((index.dataset_index == corpus).sum()) for corpus in range(3)] == [600, 300, 100]
    for corpus in range(3):  # each corpus is read in its own order, without gaps
        np.testing.assert_array_equal(
            index.dataset_sample_index[index.dataset_index == corpus],
            np.arange((index.dataset_index == corpus).sum()),
        )


def test_samples_share_no_memory(data):
    """GPTDataset edits its cached loss mask in place, so one padded sample masks all later ones."""
    folder, _ = data
    dataset = training_dataset(opened(folder), sequence_length=16, seed=2, samples=10)
    first = dataset[0]
    first["loss_mask"][:] = 0
    first["tokens"][:] = -5
    first["reference_loss"][:] = -5
    again = dataset[0]
    assert again["loss_mask"].sum() > 0
    assert (again["tokens"] >= 0).all()
    assert not (again["reference_loss"] == -5).any()
    assert dataset[1]["loss_mask"].sum() > 0


@pytest.mark.parametrize("sequence_length", [7, 16, 97, 5000])
def test_validation_reads_every_token_once(data, sequence_length):
    folder, documents = data
    dataset = validation_dataset(
        opened(folder)[0], sequence_length=sequence_length, with_offsets=True
    )
    samples = [dataset[index] for index in range(len(dataset))]
    for sample in samples:
        check_sample(sample, documents["a"], sequence_length)
    offsets = np.concatenate([sample["offsets"] for sample in samples])
    assert sorted(offsets[offsets >= 0].tolist()) == list(range(1, sum(map(len, documents["a"]))))


@pytest.mark.parametrize("lengths", [[5, 0, 0, 7, 30, 0, 1], [1] * 40, [0, 0, 50], [50, 0, 0]])
def test_empty_and_single_token_documents(tmp_path, lengths):
    documents = [np.arange(length) + 10 * number + 1 for number, length in enumerate(lengths)]
    write_corpus(tmp_path / "x", documents)
    write_scores(tmp_path / "x_scores", tmp_path / "x")
    kept = [document for document in documents if len(document)]
    for dataset in (
        training_dataset(
            opened(tmp_path, "x"), sequence_length=6, seed=0, samples=9, with_offsets=True
        ),
        validation_dataset(opened(tmp_path, "x")[0], sequence_length=6, with_offsets=True),
    ):
        for index in range(len(dataset)):
            check_sample(dataset[index], kept, 6)


def test_index_cache_is_keyed_by_content(tmp_path):
    """A corpus made again in place gets a new index; an interrupted build leaves nothing that is
    read.
    """
    cache = tmp_path / "cache"
    for seed in (1, 2):
        documents = make(tmp_path, f"x{seed}", seed=seed)
        for suffix in (".bin", ".idx", ".manifest.json"):
            (tmp_path / f"x{seed}{suffix}").replace(tmp_path / f"x{suffix}")
        write_scores(tmp_path / f"x{seed}_again", tmp_path / "x")
        corpora = open_corpora([str(tmp_path / "x")], [str(tmp_path / f"x{seed}_again")])
        for _ in range(2):  # built, then mapped
            dataset = training_dataset(
                corpora,
                sequence_length=16,
                seed=1,
                samples=10,
                index_cache=cache,
                with_offsets=True,
            )
            check_sample(dataset[len(dataset) + 1], documents, 16)
    assert len(list(cache.iterdir())) == 2


def test_changed_corpus_or_tokenizer_is_refused(tmp_path):
    """docs/method.md#point-12: another byte in the corpus, or another tokenizer, is refused."""
    make(tmp_path, "x")
    with pytest.raises(ValueError, match="tokenizer"):
        open_corpora([str(tmp_path / "x")], tokenizer={"fingerprint": "sha256:another"})
    content = bytearray((tmp_path / "x.bin").read_bytes())
    content[20] ^= 1
    (tmp_path / "x.bin").write_bytes(content)
    with pytest.raises(ValueError, match="changed"):
        opened(tmp_path, "x")


def test_scores_of_another_corpus_are_refused(tmp_path):
    make(tmp_path, "x", seed=1)
    make(tmp_path, "y", seed=2)
    with pytest.raises(ValueError, match="of another corpus"):
        open_corpora([str(tmp_path / "x")], [str(tmp_path / "y_scores")])
    with pytest.raises(ValueError, match="one per corpus"):
        open_corpora([str(tmp_path / "x"), str(tmp_path / "y")], [str(tmp_path / "y_scores")])


def test_missing_scores_are_an_error_or_ineligible(tmp_path):
    make(tmp_path, "x")
    corpus = open_corpora([str(tmp_path / "x")])[0].manifest
    store = ScoreStore.create(tmp_path / "part", score_manifest(corpus))
    store.write_shard(1, {"loss": np.zeros(64)})
    with pytest.raises(ValueError, match="incomplete"):
        open_corpora([str(tmp_path / "x")], [str(tmp_path / "part")])
    corpora = open_corpora(
        [str(tmp_path / "x")], [str(tmp_path / "part")], allow_missing_scores=True
    )
    dataset = training_dataset(corpora, sequence_length=16, seed=1, samples=10, with_offsets=True)
    for index in range(len(dataset)):
        sample = dataset[index]
        np.testing.assert_array_equal(
            np.isnan(sample["reference_loss"]), sample["offsets"] // 64 != 1
        )


def test_too_small_and_badly_weighted_corpora_are_sentences(tmp_path):
    make(tmp_path, "x", count=2, mean=3)
    with pytest.raises(ValueError, match="too few for one sample"):
        training_dataset(opened(tmp_path, "x"), sequence_length=500, seed=0, samples=1)
    with pytest.raises(ValueError, match="weights"):
        training_dataset(
            opened(tmp_path, "x"), sequence_length=2, seed=0, samples=1, weights=[1.0, 2.0]
        )
    for weight in (0.0, -1.0, math.nan, math.inf):
        with pytest.raises(ValueError, match="positive and finite"):
            training_dataset(
                opened(tmp_path, "xx"), sequence_length=2, seed=0, samples=1, weights=[1.0, weight]
            )
    with pytest.raises(ValueError, match="32768 corpora was given; it can be of at most 32767"):
        training_dataset(opened(tmp_path, "x") * 2**15, sequence_length=2, seed=0, samples=1)


@pytest.mark.parametrize("documents", [[[5]], [[], [9]]])
def test_a_validation_corpus_of_one_token_is_a_sentence(tmp_path, documents):
    write_corpus(tmp_path / "x", documents)
    (corpus,) = open_corpora([str(tmp_path / "x")])
    with pytest.raises(ValueError, match="1 tokens in . documents, none of more than one token"):
        validation_dataset(corpus, sequence_length=8)


def test_what_counts_is_found_however_many_documents_are_empty(tmp_path):
    for name, documents, counts in (
        ("nothing", [[5], [], [6], [7]], False),
        ("one", [[], [5, 6], [], [], [7]], True),
    ):
        write_corpus(tmp_path / name, documents)
        (corpus,) = open_corpora([str(tmp_path / name)])
        assert (nothing_counts(corpus) == "") == counts


def test_large_vocabularies_are_read_as_written(tmp_path):
    """Vocabularies of 65500 to 65536 are written as int32, which megatron-core's fast path reads as
    uint16.
    """
    documents = random_documents(30, 20, vocabulary_size=65520)
    write_corpus(tmp_path / "x", documents, vocabulary_size=65520)
    write_scores(tmp_path / "x_scores", tmp_path / "x")
    dataset = training_dataset(
        opened(tmp_path, "x"), sequence_length=16, seed=0, samples=1, with_offsets=True
    )
    for index in range(len(dataset)):
        check_sample(dataset[index], documents, 16)
