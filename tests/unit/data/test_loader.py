import threading

import numpy as np
import pytest
import torch
from hypothesis import given, settings, strategies

from megatron_slm.data.batch import collate, hidden_from, slice_for_context_parallel
from megatron_slm.data.loader import TrainingLoader, ValidationLoader
from megatron_slm.data.scored_dataset import open_corpora, training_dataset, validation_dataset
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores
from tests.megatron_core import INSTALLED

S = 8


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_corpus(folder / "x", random_documents(40, 20))
    write_scores(folder / "s", folder / "x", columns=("loss", "mine"))
    return open_corpora([str(folder / "x")], [str(folder / "s")])


@pytest.fixture(scope="module")
def dataset(corpus):
    return training_dataset(corpus, sequence_length=S, seed=1, samples=100, with_offsets=True)


def global_batch(dataset, steps, global_batch_size, micro_batch_size, dp_size, start_sample=0):
    """token_id -> (tokens, label offset, score) of the last of `steps` steps, over all ranks."""
    seen = {}
    for rank in range(dp_size):
        loader = TrainingLoader(
            dataset,
            global_batch_size=global_batch_size,
            micro_batch_size=micro_batch_size,
            dp_rank=rank,
            dp_size=dp_size,
            start_sample=start_sample,
        )
        for _ in range(steps):
            batches = loader.next_step()
        loader.close()
        for batch in batches:
            assert batch.tokens_BS.shape == (micro_batch_size, S)
            assert not seen.keys() & set(batch.token_id_BS.flatten().tolist())
            rows = zip(
                batch.token_id_BS.flatten().tolist(),
                batch.tokens_BS.flatten().tolist(),
                batch.offsets_BS.flatten().tolist(),
                torch.nan_to_num(batch.columns["reference_loss"], nan=-1).flatten().tolist(),
                strict=True,
            )
            seen |= {token_id: rest for token_id, *rest in rows}
    return seen


@settings(max_examples=12, deadline=None)
@given(step=strategies.integers(1, 40))
def test_the_global_batch_does_not_depend_on_the_layout(dataset, step):
    plain = global_batch(dataset, step, 8, 8, 1)
    assert sorted(plain) == list(range(8 * S))
    for micro_batch_size, dp_size in ((1, 1), (2, 2), (1, 8), (4, 2), (2, 4)):
        assert global_batch(dataset, step, 8, micro_batch_size, dp_size) == plain


def test_a_micro_batch_of_all_ranks_is_a_contiguous_slice(dataset):
    """The documented rule: sample g = (m * dp_size + r) * micro_batch_size + j."""
    loaders = [
        TrainingLoader(dataset, global_batch_size=12, micro_batch_size=2, dp_rank=rank, dp_size=3)
        for rank in range(3)
    ]
    steps = [loader.next_step() for loader in loaders]
    [loader.close() for loader in loaders]
    for m in range(2):
        samples = [int(i) // S for step in steps for i in step[m].token_id_BS[:, 0]]
        assert samples == list(range(6 * m, 6 * m + 6))


def test_resume_seeks_and_a_new_layout_loses_nothing(dataset):
    first = TrainingLoader(dataset, global_batch_size=8, micro_batch_size=2, dp_rank=0, dp_size=2)
    for _ in range(5):
        first.next_step()
    state = first.state_dict()  # steps read ahead but not handed out do not count
    first.close()
    assert state == {"consumed_samples": 40}
    assert global_batch(
        dataset, 1, 8, 1, 4, start_sample=state["consumed_samples"]
    ) == global_batch(dataset, 6, 8, 2, 2)
    again = TrainingLoader(dataset, global_batch_size=8, micro_batch_size=2, dp_rank=0, dp_size=2)
    again.next_step()
    again.load_state_dict(state)
    np.testing.assert_array_equal(
        again.next_step()[0].offsets_BS, _step_of(dataset, 6)[0].offsets_BS
    )
    again.close()


def _step_of(dataset, count):
    loader = TrainingLoader(dataset, global_batch_size=8, micro_batch_size=2, dp_rank=0, dp_size=2)
    steps = [loader.next_step() for _ in range(count)]
    loader.close()
    return steps[-1]


def test_close_leaves_no_thread_and_can_go_on(dataset):
    loader = TrainingLoader(dataset, global_batch_size=2, micro_batch_size=1, dp_rank=0, dp_size=1)
    loader.next_step()
    thread = loader._reader._thread
    loader.close()
    assert not thread.is_alive()
    np.testing.assert_array_equal(loader.next_step()[0].offsets_BS[0], dataset[2]["offsets"])
    loader.close()


def test_reading_ahead_is_bounded(dataset):
    """Steps that nobody asked for stay within prefetch_steps, and one that is being read."""
    read = []
    idle = threading.Event()

    class Counted:
        def __getitem__(self, index):
            read.append(index)
            if len(read) > 4:  # one step handed out, two waiting, one being read: all that may be
                idle.set()
            return dataset[index]

        def __len__(self):
            return len(dataset)

    loader = TrainingLoader(
        Counted(),
        global_batch_size=1,
        micro_batch_size=1,
        dp_rank=0,
        dp_size=1,
        prefetch_steps=2,
    )
    loader.next_step()
    assert not idle.wait(0.5), "a fifth step was read though only one was handed out"
    assert read == [0, 1, 2, 3]
    loader.close()


def test_an_error_while_reading_reaches_the_trainer(dataset):
    class Broken:
        def __getitem__(self, index):
            if index >= 4:
                raise OSError("disk gone")
            return dataset[index]

    loader = TrainingLoader(Broken(), global_batch_size=2, micro_batch_size=1, dp_rank=0, dp_size=1)
    loader.next_step(), loader.next_step()
    for _ in range(2):
        with pytest.raises(OSError, match="disk gone"):
            loader.next_step()
    loader.close()


def test_a_fault_is_known_before_the_step_is_asked_for(dataset):
    class Broken:
        def __getitem__(self, index):
            if index >= 2:
                raise ValueError("b.bin: cut short")
            return dataset[index]

    loader = TrainingLoader(Broken(), global_batch_size=1, micro_batch_size=1, dp_rank=0, dp_size=1)
    for sample in range(2):
        assert loader.fault() is None
        assert loader.state_dict() == {"consumed_samples": sample}
        np.testing.assert_array_equal(
            loader.next_step()[0].offsets_BS[0], dataset[sample]["offsets"]
        )
    assert str(loader.fault()) == "b.bin: cut short"
    with pytest.raises(ValueError, match="cut short"):
        loader.next_step()
    loader.close()


def test_sizes_that_do_not_divide_are_a_sentence(dataset):
    with pytest.raises(ValueError, match="global_batch_size is 9.*2 x 2 = 4"):
        TrainingLoader(dataset, global_batch_size=9, micro_batch_size=2, dp_rank=0, dp_size=2)


def test_validation_covers_the_corpus_once_over_ranks(corpus):
    dataset = validation_dataset(corpus[0], sequence_length=S, with_offsets=True)
    loaders = [
        ValidationLoader(dataset, global_batch_size=12, micro_batch_size=3, dp_rank=rank, dp_size=2)
        for rank in range(2)
    ]
    counted = []
    for loader in loaders:
        steps = list(loader)
        assert {len(step) for step in steps} == {2}
        assert len(steps) == len(loader) == -(-len(dataset) // 12)
        counted += [batch.offsets_BS[batch.loss_mask_BS == 1] for step in steps for batch in step]
    flat = torch.cat(counted).tolist()
    assert len(flat) == len(set(flat)) == corpus[0].manifest.tokens - corpus[0].manifest.documents


def test_validation_reads_the_same_batches_every_time(corpus):
    dataset = validation_dataset(corpus[0], sequence_length=S, with_offsets=True)
    loader = ValidationLoader(
        dataset, global_batch_size=4, micro_batch_size=2, dp_rank=0, dp_size=1, global_batches=3
    )
    first = [batch.offsets_BS for step in loader for batch in step]
    second = [batch.offsets_BS for step in loader for batch in step]
    assert len(loader) == 3
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def test_context_parallel_slices_apply_to_every_tensor_alike(dataset):
    """docs/method.md#point-15: all tensors are cut into the same head-tail chunks."""
    batch = collate([dataset[0], dataset[1]], [0, 1])
    for size in (2, 4):
        parts = [slice_for_context_parallel(batch, rank, size) for rank in range(size)]
        for rank, part in enumerate(parts):
            chunk = S // (2 * size)
            positions = [
                *range(rank * chunk, (rank + 1) * chunk),
                *range((2 * size - 1 - rank) * chunk, (2 * size - rank) * chunk),
            ]
            for name in (
                "tokens_BS",
                "labels_BS",
                "loss_mask_BS",
                "position_ids_BS",
                "token_id_BS",
                "offsets_BS",
            ):
                assert torch.equal(getattr(part, name), getattr(batch, name)[:, positions])
            for name in batch.columns:
                assert torch.equal(
                    part.columns[name].nan_to_num(-1),
                    batch.columns[name][:, positions].nan_to_num(-1),
                )
            assert torch.equal(part.corpus_id_B, batch.corpus_id_B)
    assert slice_for_context_parallel(batch, 0, 1) is batch
    with pytest.raises(ValueError, match="multiple of 6"):
        slice_for_context_parallel(batch, 0, 3)


def test_slices_are_megatron_cores(dataset, monkeypatch):
    from megatron.core import utils

    monkeypatch.setattr(utils, "get_pg_size", lambda group: 2)
    monkeypatch.setattr(utils, "get_pg_rank", lambda group: group)
    monkeypatch.setattr(torch.distributed, "get_world_size", lambda group: 2)
    monkeypatch.setattr(torch.distributed, "get_rank", lambda group: group)
    batch = collate([dataset[0], dataset[1]], [0, 1])
    plain = {} if INSTALLED == "0.16.1" else {"is_hybrid_cp": False}
    for rank in range(2):
        theirs = utils.get_batch_on_this_cp_rank(
            {"tokens": batch.tokens_BS, "score": batch.columns["mine"]}, cp_group=rank, **plain
        )
        ours = slice_for_context_parallel(batch, rank, 2)
        assert torch.equal(ours.tokens_BS, theirs["tokens"])
        assert torch.equal(ours.columns["mine"].nan_to_num(-1), theirs["score"].nan_to_num(-1))


def test_batch_dtypes_and_move(dataset):
    batch = collate([dataset[5], dataset[6], dataset[7]], [3, 4, 5]).to("cpu")
    for name in ("tokens_BS", "labels_BS", "position_ids_BS", "token_id_BS", "corpus_id_B"):
        assert getattr(batch, name).dtype == torch.int64
    assert batch.loss_mask_BS.dtype == torch.float32
    assert {name: column.dtype for name, column in batch.columns.items()} == {
        "reference_loss": torch.float32,
        "mine": torch.float32,
    }
    assert batch.token_id_BS[2].tolist() == [5 * S + position for position in range(S)]
    assert batch.document_start_BS is None


def test_the_mask_of_isolated_documents_is_causal_within_each_and_sliced_like_everything(corpus):
    dataset = training_dataset(
        corpus, sequence_length=S, seed=1, samples=100, isolate_documents=True
    )
    batch = collate([dataset[0], dataset[1]], [0, 1])
    whole = hidden_from(batch.document_start_BS)
    for row, starts in enumerate(batch.document_start_BS.tolist()):
        for query, start in enumerate(starts):
            assert [key for key in range(S) if not whole[row, 0, query, key]] == list(
                range(start, query + 1)
            )
            assert batch.position_ids_BS[row, query] == query - start
    assert len(batch.document_start_BS.unique()) > 1, "samples of one document test nothing"
    for size in (2, 4):
        for rank in range(size):
            part = slice_for_context_parallel(batch, rank, size)
            rows = part.token_id_BS[0]
            assert torch.equal(hidden_from(part.document_start_BS, rank, size), whole[:, :, rows])
