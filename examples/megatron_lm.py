"""Selective language modeling in Megatron-LM's pretrain_gpt.py (core_v0.16.1 to core_v0.19.0).

Put this file beside pretrain_gpt.py, and let that file's call of pretrain take these two:

    from megatron_lm import scored_datasets, selective
    provider = scored_datasets(train_valid_test_datasets_provider, "data/corpus", "data/scores",
                               sequence_length=4096, seed=1234)
    pretrain(..., provider, ..., selective(forward_step, keep_fraction=0.6), ...)

Run it with --calculate-per-token-loss and --no-create-attention-mask-in-dataloader. Validation and
test stay as they are, over all tokens.
"""

from functools import partial
from typing import Any

import torch
from megatron.core import parallel_state as mpu
from megatron.core.utils import get_model_config
from torch.utils.data import Subset

from megatron_slm.data.batch import head_and_tail
from megatron_slm.data.scored_dataset import ScoredDataset, open_corpora
from megatron_slm.selection import excess_loss, select_top


def scored_datasets(provider, corpus: str, scores: str, *, sequence_length: int, seed: int):
    """Megatron-LM's provider of datasets, with samples that carry scores as its training data."""

    def provide(samples, *rest, **named):
        opened = open_corpora([corpus], [scores])[0]
        dataset: Any = ScoredDataset(opened, sequence_length=sequence_length, seed=seed)
        return Subset(dataset, range(samples[0])), *provider(samples, *rest, **named)[1:]

    # Every rank calls it, as Megatron-LM's own.
    provide.__dict__["is_distributed"] = True
    return provide


class ScoreKeeper:
    """Megatron-LM's data iterator; keeps the scores, which its get_batch would not hand on."""

    def __init__(self, iterator):
        self.iterator = iterator

    def __next__(self):
        batch = next(self.iterator)
        self.reference_loss_BS = batch.pop("reference_loss", None)
        return {name: value for name, value in batch.items() if name != "corpus_id"}

    def on_this_rank(self, like_BS):
        """The scores of this context-parallel rank; only the first tensor rank reads the data."""
        part_BS = torch.empty_like(like_BS)
        if mpu.get_tensor_model_parallel_rank() == 0:
            cp = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
            part_BS.copy_(head_and_tail(self.reference_loss_BS, *cp))
        group = mpu.get_tensor_model_parallel_group()
        torch.distributed.broadcast(part_BS, group=group, group_src=0)
        return part_BS


def selective(forward_step, keep_fraction: float):
    """Megatron-LM's forward_step; in training its loss is that of the selected tokens."""

    def selective_loss(loss, batches, output_BS):
        loss_mask_BS = loss.args[0]  # of partial(loss_func, loss_mask, model=model)
        score_BS = excess_loss(output_BS, batches.on_this_rank(loss_mask_BS))
        group = mpu.get_data_parallel_group(with_context_parallel=True)
        mask_BS = select_top(score_BS, loss_mask_BS > 0, keep_fraction, group=group).mask
        return loss.func(mask_BS.float(), output_BS, **loss.keywords)  # sums and counts its mask

    def step(data_iterator, model, *rest, **named):
        if not get_model_config(model).calculate_per_token_loss:
            raise ValueError("--calculate-per-token-loss is needed: the mean is over tokens")
        batches = ScoreKeeper(data_iterator)
        output, loss = forward_step(batches, model, *rest, **named)
        return output, partial(selective_loss, loss, batches) if model.training else loss

    return step
