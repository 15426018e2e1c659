"""The index arrays of an epoch: cut as megatron-core cuts them, and kept in a cache."""

import numpy as np
import pytest
from hypothesis import assume, given, settings, strategies
from megatron.core.datasets import helpers

from megatron_slm.data import epoch_index
from megatron_slm.data.epoch_index import EpochIndex, build_once, cut_in_order, shuffled_epoch


@settings(max_examples=200, deadline=None)
@given(
    lengths=strategies.lists(strategies.integers(0, 12), min_size=1, max_size=40),
    sequence_length=strategies.integers(1, 30),
    documents_at_once=strategies.integers(1, 50),
    seed=strategies.integers(0, 2**31),
)
def test_samples_are_cut_as_megatron_core_s_compiled_helper_cuts_them(
    lengths, sequence_length, documents_at_once, seed
):
    """Empty documents, documents of several samples, and any number of documents at once."""
    sizes = np.array(lengths, np.int32)
    order = np.random.RandomState(seed).permutation(len(sizes)).astype(np.int32)
    tokens = int(sizes.sum())
    assume(tokens > sequence_length)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(epoch_index, "DOCUMENTS_AT_ONCE", documents_at_once)
        ours = cut_in_order(sizes, order, tokens, sequence_length)
    theirs = helpers.build_sample_idx(sizes, order, sequence_length, 1, tokens, True, True)
    assert ours.dtype == theirs.dtype
    np.testing.assert_array_equal(ours, theirs)


def test_cache_gives_what_building_gives_and_survives_read_only_folders(tmp_path):
    lengths = np.array([5, 9, 30, 2], np.int32)
    built = shuffled_epoch(lengths, 46, 8, seed=1, epoch=0)
    calls = []

    def build():
        calls.append(1)
        return built

    for _ in range(2):
        cached = build_once(tmp_path / "cache" / "epoch", EpochIndex, build)
        for name in ("document_index", "sample_index", "shuffle_index"):
            np.testing.assert_array_equal(getattr(cached, name), getattr(built, name))
    assert len(calls) == 1
    (tmp_path / "file").write_text("not a folder")
    assert build_once(tmp_path / "file" / "epoch", EpochIndex, build) is built
