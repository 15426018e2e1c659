"""However often the sequence length or the seed changes: an epoch reads no token twice, and loses
less than a sample per cut.
"""

import numpy as np
import pytest
from hypothesis import given, settings, strategies

from megatron_slm.data.blend import samples_by_corpus
from megatron_slm.data.corpora import open_corpora
from megatron_slm.data.corpus_order import CorpusOrder, Documents, token_ranges
from megatron_slm.data.position import Stretch, add_stretch
from megatron_slm.data.scored_dataset import training_dataset
from megatron_slm.testing.corpora import random_documents, write_corpus


def documents_of(lengths) -> Documents:
    lengths = np.array(lengths, np.int32)
    pointers = np.append(0, np.cumsum(lengths[:-1], dtype=np.int64)) * 2
    return Documents(pointers, lengths, 2, int(lengths.sum()))


def labels_of(pieces) -> list[int]:
    """Tokens that carry a loss: all but the first of every piece, which nothing before it explains
    or the sample before had.
    """
    return [token for start, end in pieces for token in range(start + 1, end)]


@settings(max_examples=150, deadline=None)
@given(
    lengths=strategies.lists(strategies.integers(0, 30), min_size=4, max_size=40).filter(
        lambda lengths: sum(lengths) > 25
    ),
    stretches=strategies.lists(
        strategies.builds(
            Stretch,
            sequence_length=strategies.integers(2, 24),
            seed=strategies.integers(0, 2),
            samples=strategies.integers(0, 40),
        ),
        min_size=1,
        max_size=5,
    ),
)
def test_an_epoch_reads_every_token_once_over_all_changes(lengths, stretches):
    documents = documents_of(lengths)
    past = ()
    read: dict[int, list[int]] = {}
    cuts: dict[int, int] = {}
    for stretch in stretches:
        order = CorpusOrder(
            documents, sequence_length=stretch.sequence_length, seed=stretch.seed, past=past
        )
        for index in range(stretch.samples):
            pieces = order.pieces(index)
            assert sum(end - start for start, end in pieces) == stretch.sequence_length + 1
            read.setdefault(order.place(index).epoch, []).extend(labels_of(pieces))
        epoch = order.place(stretch.samples).epoch
        for number in range(order.first_epoch - 1, epoch + 1):
            cuts[number] = cuts.get(number, 0) + stretch.sequence_length
        past = add_stretch(past, stretch)
    trainable = sum(max(0, length - 1) for length in lengths)
    for number, labels in read.items():
        assert len(set(labels)) == len(labels)
        if number < epoch:  # read to its end
            assert len(labels) > trainable - cuts[number]


def test_a_stretch_that_goes_on_is_the_stretch_that_never_stopped():
    documents = documents_of([9, 4, 30, 0, 17, 22])
    whole = CorpusOrder(documents, sequence_length=6, seed=3)
    past = add_stretch((), Stretch(6, 3, 5))
    past = add_stretch(past, Stretch(6, 3, 8))
    assert past == (Stretch(6, 3, 13),)
    assert add_stretch(past, Stretch(9, 3, 0)) == past
    resumed = CorpusOrder(documents, sequence_length=6, seed=3, past=past)
    for index in range(40):
        assert resumed.pieces(index) == whole.pieces(13 + index)


def test_at_the_end_of_an_epoch_a_change_begins_the_next_one():
    documents = documents_of([9, 4, 30, 17, 22])
    before = CorpusOrder(documents, sequence_length=6, seed=0)
    past = (Stretch(6, 0, 2 * before.samples_per_epoch),)
    after = CorpusOrder(documents, sequence_length=9, seed=0, past=past)
    plain = CorpusOrder(documents, sequence_length=9, seed=0)
    assert after.pieces(0) == plain.pieces(2 * plain.samples_per_epoch)


def test_what_is_left_of_an_epoch_is_read_before_the_next_one_from_the_cache_too(tmp_path):
    documents = documents_of([9, 4, 30, 17, 22])
    past = (Stretch(6, 0, 3), Stretch(4, 1, 5))
    kept, built = (
        CorpusOrder(documents, sequence_length=8, seed=0, past=past, cache=cache)
        for cache in (tmp_path, None)
    )
    again = CorpusOrder(documents, sequence_length=8, seed=0, past=past, cache=tmp_path)
    rest_samples = len(built.rest.shuffle_index)
    assert rest_samples > 1
    for index in range(rest_samples + 5):
        assert kept.pieces(index) == built.pieces(index) == again.pieces(index)
    assert built.place(rest_samples - 1).epoch == 0
    assert built.place(rest_samples).epoch == 1


def test_one_sample_is_found_as_runs_of_samples_are():
    documents = documents_of([9, 4, 30, 0, 17, 22])
    for past in ((), (Stretch(6, 0, 3),)):
        order = CorpusOrder(documents, sequence_length=8, seed=0, past=past)
        for number in range(12):
            place = order.place(number)
            row = np.array([place.index.shuffle_index[place.within]], np.int64)
            starts, ends = token_ranges(documents, place.index, row, row)
            assert order.pieces(number) == list(zip(starts.tolist(), ends.tolist(), strict=True))


@pytest.fixture(scope="module")
def corpora(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpora")
    for number, count in enumerate((60, 25, 110)):
        write_corpus(folder / f"c{number}", random_documents(count, 20, seed=number))
    return open_corpora([str(folder / f"c{number}") for number in range(3)])


def test_each_corpus_of_a_changed_blend_goes_on_where_it_was(corpora):
    """Samples in the order of reading, per corpus, under two blends: those of the corpus alone."""
    settings_ = dict(sequence_length=16, seed=2, with_offsets=True)
    weights = [0.7, 0.11, 0.19]
    first = training_dataset(corpora, **settings_, samples=50, weights=weights)
    counts = samples_by_corpus(weights, 50)
    pasts = [(Stretch(16, 2, count),) for count in counts]
    moved = [2, 0]  # another order, and one corpus less
    moved_corpora = [corpora[number] for number in moved]
    moved_pasts = [pasts[number] for number in moved]
    second = training_dataset(
        moved_corpora, **settings_, samples=40, weights=[1, 1], pasts=moved_pasts
    )
    read = {number: [] for number in range(3)}
    for index in range(50):
        sample = first[index]
        read[int(sample["corpus_id"])].append(sample["offsets"])
    assert [len(read[number]) for number in range(3)] == counts
    for index in range(40):
        sample = second[index]
        read[moved[int(sample["corpus_id"])]].append(sample["offsets"])
    for number, offsets in read.items():
        alone = training_dataset([corpora[number]], **settings_, samples=0)
        for index, found in enumerate(offsets):
            np.testing.assert_array_equal(found, alone[index]["offsets"])


@settings(max_examples=60, deadline=None)
@given(
    weights=strategies.lists(strategies.floats(0.01, 9), min_size=2, max_size=3),
    samples=strategies.integers(0, 300),
)
def test_samples_are_counted_as_the_blend_gives_them(corpora, weights, samples):
    dataset = training_dataset(
        corpora[: len(weights)], sequence_length=16, seed=2, samples=301, weights=weights
    )
    given_ids = dataset.dataset_index[:samples]
    assert samples_by_corpus(weights, samples) == [
        int((given_ids == number).sum()) for number in range(len(weights))
    ]


def test_a_larger_plan_is_not_read_from_the_index_of_a_smaller_one(corpora, tmp_path):
    """A run that goes on longer finds the index of its first plan cached, and needs its own."""
    for samples in (20, 90):
        dataset = training_dataset(
            corpora, sequence_length=16, seed=2, samples=samples, index_cache=tmp_path
        )
        assert len(dataset.dataset_index) == samples
        assert "labels" in dataset[samples - 1]


def test_an_epoch_is_given_though_another_thread_drops_it_meanwhile():
    """The loader reads ahead, while the data of a loss that jumped are read again."""
    order = CorpusOrder(documents_of([5, 7]), sequence_length=4)
    index = order.epoch(0)

    class DroppedWhenLookedUp(dict):
        def __contains__(self, number):
            order.epochs = {}
            return True

        def get(self, number):
            order.epochs = {}
            return self[number]

    order.epochs = DroppedWhenLookedUp({0: index})
    assert order.epoch(0) is index
