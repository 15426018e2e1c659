"""What examples/megatron_lm.py changes, in place of Megatron-LM, which no registry has: get_batch,
loss_func and forward_step with the names, arguments and results that they have in its
pretrain_gpt.py (core_v0.16.1 to core_v0.19.0), and the step around them, on megatron-core's own
schedule, gradients and division.
"""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state as mpu
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_model_config
from torch.utils.data import DataLoader

from megatron_slm.checkpoint.weights import load_weights
from megatron_slm.config.load import load_yaml
from megatron_slm.config.schema import Config, ParallelConfig
from megatron_slm.data.batch import head_and_tail
from megatron_slm.data.loader import rank_indices
from megatron_slm.model.build import build_model
from megatron_slm.model.decoder import head_output
from megatron_slm.model.optimizer import build_optimizer, update_weights, wrap_data_parallel
from megatron_slm.parallel import Groups
from tests.end_to_end.examples_here import example, note_choices
from tests.end_to_end.tiny_run import VOCABULARY

KEYS = ("tokens", "labels", "loss_mask", "position_ids")


def get_batch(data_iterator, vp_stage=None):
    """Rank 0 of the tensor group reads; a pipeline stage gets what it needs; each context-parallel
    rank its part.
    """
    batch = next(data_iterator) if mpu.get_tensor_model_parallel_rank() == 0 else {}
    sent = [[batch.get(key) for key in KEYS]]
    dist.broadcast_object_list(sent, group=mpu.get_tensor_model_parallel_group(), group_src=0)
    batch = dict(zip(KEYS, sent[0], strict=True))
    if not mpu.is_pipeline_first_stage():
        batch |= {"tokens": None, "position_ids": None}
    if not mpu.is_pipeline_last_stage():
        batch |= {"labels": None, "loss_mask": None}
    cp = mpu.get_context_parallel_rank(), mpu.get_context_parallel_world_size()
    return [value if value is None else head_and_tail(value, *cp) for value in batch.values()]


def loss_func(loss_mask, output_tensor, model=None):
    """(sum of the losses under the mask, its count, what is reported)."""
    loss = (output_tensor.float() * loss_mask.float()).sum()
    num_tokens = loss_mask.sum().int()
    return loss, num_tokens, {"lm loss": torch.stack([loss.detach(), num_tokens.float()])}


def forward_step(data_iterator, model, return_schedule_plan=False):
    tokens, labels, loss_mask, position_ids = get_batch(data_iterator)
    output = model(tokens, position_ids, None, labels=labels)
    if labels is not None:
        output = head_output(output).loss_BS  # as GPTModel's own head gives it
    return output, partial(loss_func, loss_mask, model=model)


def run(groups: Groups, layout_name: str, folder: Path) -> dict:
    """Two steps from the weights of FOLDER/start on the data of FOLDER/baseline, this rank's."""
    layout = ParallelConfig(tensor=groups.tp_size, pipeline=groups.pp_size, context=groups.cp_size)
    config = load_yaml(folder / "baseline" / "config.yaml")
    micro_batch_size = config.data.micro_batch_size // groups.dp_size
    data = replace(config.data, micro_batch_size=micro_batch_size)
    config = replace(config, parallel=layout, data=data)
    models = wrap_data_parallel(build_model(config, VOCABULARY, groups), config)
    load_weights(models, folder / "start", groups)
    get_model_config(models[0]).finalize_model_grads_func = finalize_model_grads
    optimizer = build_optimizer(models, config)

    megatron_lm = example("megatron_lm")
    choices = note_choices(megatron_lm)
    provider = megatron_lm.scored_datasets(
        lambda samples: (None, None, None),
        config.data.train[0],
        config.selection.reference.scores[0],
        sequence_length=config.data.sequence_length,
        seed=config.run.seed,
    )
    step = megatron_lm.selective(forward_step, config.selection.keep_fraction)
    steps = config.schedule.train_steps
    dataset, *_ = provider((steps * data.global_batch_size, 0, 0))
    batches = iter(DataLoader(dataset, batch_sampler=_rank_batches(config, groups, steps)))
    records = []
    for _ in range(steps):
        models[0].zero_grad_buffer()
        optimizer.zero_grad()
        reports = get_forward_backward_func()(
            forward_step_func=step,
            data_iterator=batches if groups.tp_rank == 0 else None,
            model=models[0],
            num_microbatches=data.global_batch_size // _sequences_at_once(config, groups),
            seq_length=data.sequence_length,
            micro_batch_size=micro_batch_size,
            forward_only=False,
        )
        _, grad_norm = update_weights(optimizer, config.optimizer.learning_rate)
        if groups.is_last_stage:
            total = sum(report["lm loss"].double() for report in reports)
            dist.all_reduce(total, group=groups.dp_cp)
            loss_sum, selected = total.tolist()
            records.append(
                {"loss": loss_sum / selected, "selected": selected, "grad_norm": grad_norm}
            )
    return {"records": records, "choices": choices}


def _sequences_at_once(config: Config, groups: Groups) -> int:
    """Sequences of one micro-batch of all data-parallel ranks."""
    return config.data.micro_batch_size * groups.dp_size


def _rank_batches(config: Config, groups: Groups, steps: int) -> Iterator[list[int]]:
    """Samples of this rank's micro-batches, as MegatronPretrainingSampler deals them."""
    step = config.data.global_batch_size
    micro_batches = step // _sequences_at_once(config, groups)
    rows = rank_indices(micro_batches, config.data.micro_batch_size, groups.dp_rank, groups.dp_size)
    for number in range(steps):
        for indices in rows:
            yield [number * step + index for index in indices]
