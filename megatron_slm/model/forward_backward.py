"""Run micro-batches through megatron-core's pipeline schedule: forward and backward, or forward
only.

B: sequences of one micro-batch, S: tokens of a sequence on this context-parallel rank.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer.module import MegatronModule
from megatron.core.utils import get_attr_wrapped_model, get_model_config
from torch import Tensor

from megatron_slm.data.batch import Batch, hidden_from
from megatron_slm.model.decoder import HeadChoice, HeadOutput, head_output
from megatron_slm.model.router import scale_auxiliary_losses
from megatron_slm.parallel import Groups

Report = TypeVar("Report")
LossFunction = Callable[[int, Batch, HeadOutput], tuple[Tensor, Tensor, Report]]
"""(number of the micro-batch, batch, model output) -> (sum of weighted losses, divisor, report).

The divisor is a float64 0-d tensor; the report is whatever the caller wants back.
"""


def forward_backward(
    models: Sequence[DistributedDataParallel],
    batches: Sequence[Batch],
    loss_function: LossFunction[Report],
    groups: Groups,
    *,
    divisor_ahead: Tensor | None = None,
    head_choices: Sequence[HeadChoice] | None = None,
) -> list[Report]:
    """Accumulate the gradient of (sum of losses over all micro-batches and ranks) / (sum of
    divisors), in main_grad. Returns the reports of the last stage, else [].

    Equals, in one process: `(sum_m loss_sum_m / sum_m divisor_m).backward()`. The divisor is summed
    here in float64 and not through megatron-core's `num_tokens`, which is an integer: a float there
    raises on last-stage ranks only and hangs the others, and soft token weights need a float
    (docs/method.md#point-1, #point-2).

    divisor_ahead  for models with experts: the divisors that this rank's micro-batches will have
                   (float64, 0-d; read on the last stage). With it the mean over micro-batches of
                   the routers' auxiliary losses is added to what is differentiated (router.py).
    head_choices   where the choice is known: one per micro-batch on the last stage, empty
                   elsewhere. The head then computes the chosen tokens only, and gives a HeadOutput
                   with their loss_sum.
    """
    if divisor_ahead is not None:
        step_divisor = _over_ranks(divisor_ahead, groups)
        micro_batches = len(batches) * groups.dp_size
        scale_auxiliary_losses(models, _one_for_zero(step_divisor) / micro_batches)
    divisor = torch.zeros((), dtype=torch.float64, device=groups.device)

    def counted_loss(index: int, batch: Batch, output: HeadOutput):
        loss_sum, part, report = loss_function(index, batch, output)
        divisor.add_(part)
        return loss_sum, torch.zeros((), dtype=torch.int, device=groups.device), report

    def finalize(chunks, num_tokens=None, pg_collection=None, force_all_reduce=False):
        finalize_model_grads(
            chunks, None, pg_collection=pg_collection, force_all_reduce=force_all_reduce
        )
        _divide_gradients(chunks, divisor, groups)

    for model in models:
        get_model_config(model).finalize_model_grads_func = finalize
    return _run(
        models, batches, counted_loss, groups, forward_only=False, head_choices=head_choices
    )


def _divide_gradients(
    chunks: Sequence[DistributedDataParallel], divisor: Tensor, groups: Groups
) -> None:
    """Divide all gradients by the global divisor.

    With nothing selected anywhere the gradients of the loss are already zero and stay so.
    """
    scale = (1.0 / _one_for_zero(_over_ranks(divisor, groups))).float()
    for chunk in chunks:
        chunk.scale_gradients(scale)


def _over_ranks(part: Tensor, groups: Groups) -> Tensor:
    """The sum of the parts of the last stage's data x context ranks, on every rank of the job."""
    total = part.clone()
    if groups.pp_size > 1:  # the divisor lives on the last stage; every stage's gradients need it
        dist.broadcast(total, group=groups.pp, group_src=groups.pp_size - 1)
    dist.all_reduce(total, group=groups.dp_cp)
    return total


def _one_for_zero(divisor: Tensor) -> Tensor:
    """1 in place of 0: a step that selected nothing has no loss to divide, and experts still learn
    to share the load.
    """
    return torch.where(divisor > 0, divisor, 1.0)


@torch.no_grad()
def forward_losses(
    models: Sequence[MegatronModule],
    batches: Sequence[Batch],
    groups: Groups,
    *,
    extras: tuple[str, ...] = (),
) -> list[dict[str, Tensor]]:
    """Per-token losses without a graph: one dict per batch on the last pipeline stage, else [].

    Each dict has "loss" and every name in `extras` ("entropy", nats), each fp32 [B, S]. Equals
    `cross_entropy(logits, labels, reduction="none")` on fp32 logits. Dropout is off; the models'
    modes are restored. Every rank of the model-parallel group calls it with the same batches;
    batches may differ in shape only without pipeline parallelism.
    """
    extras_before = set_extra_outputs(models, tuple(extras))
    try:
        with _evaluation_mode(models):
            return _run(
                models,
                batches,
                lambda _, batch, output: output.per_token(),
                groups,
                forward_only=True,
            )
    finally:
        set_extra_outputs(models, extras_before)


@torch.no_grad()
def forward_logits(
    models: Sequence[MegatronModule], batches: Sequence[Batch], groups: Groups
) -> list[Tensor]:
    """logits_BV per batch, fp32, after the one token of each sequence that loss_mask_BS marks: on
    the last pipeline stage, else [].

    Equals `model(tokens_BS).logits[arange(B), position_B].float()`; no other logits are computed.
    Padding of the vocabulary is cut off, and all tensor and context ranks get the same. Dropout is
    off. Who has to call it, and with what: as `forward_losses`.
    """

    def whole(_, batch: Batch, output: HeadOutput) -> Tensor:
        logits_BV = output.loss_BS.float().contiguous()  # the one output of a model without labels
        if groups.cp_size > 1:
            dist.all_reduce(logits_BV, group=groups.cp)
        if groups.tp_size == 1:
            return logits_BV
        parts = [torch.empty_like(logits_BV) for _ in range(groups.tp_size)]
        dist.all_gather(parts, logits_BV, group=groups.tp)
        return torch.cat(parts, dim=-1)

    with _evaluation_mode(models):
        found = _run(models, batches, whole, groups, forward_only=True, asks_for_logits=True)
    size = get_attr_wrapped_model(models[-1], "vocabulary_size")
    return [logits_BV[:, :size] for logits_BV in found]


@contextmanager
def _evaluation_mode(models: Sequence[MegatronModule]) -> Iterator[None]:
    """Without dropout; the modes are restored."""
    training = [model.training for model in models]
    for model in models:
        model.eval()
    try:
        yield
    finally:
        for model, mode in zip(models, training, strict=True):
            model.train(mode)


def set_extra_outputs(models: Sequence[MegatronModule], extras: tuple[str, ...]) -> tuple[str, ...]:
    """Select the per-token outputs that come beside the loss; returns the previous ones."""
    decoders = [
        get_attr_wrapped_model(model, "extra_outputs", return_model_obj=True) for model in models
    ]
    before = decoders[0].extra_outputs
    for decoder in decoders:
        decoder.extra_outputs = extras
    return before


def _run(
    models: Sequence[MegatronModule],
    batches: Sequence[Batch],
    loss_function: Callable[[int, Batch, HeadOutput], Any],
    groups: Groups,
    *,
    forward_only: bool,
    head_choices: Sequence[HeadChoice] | None = None,
    asks_for_logits: bool = False,
) -> list:
    """Run the schedule; returns the reports of loss_function, which only the last stage has.

    asks_for_logits: of the tokens that loss_mask_BS marks, in place of losses.
    """

    def step(iterator, model):
        index, batch = next(iterator)
        mask = None
        if batch.document_start_BS is not None:
            mask = hidden_from(batch.document_start_BS, groups.cp_rank, groups.cp_size)
        if asks_for_logits:
            asked = {"asked_BS": batch.loss_mask_BS}
        else:
            choice = {"head_choice": head_choices[index]} if head_choices else {}
            asked = {"labels": batch.labels_BS, **choice}
        output = model(batch.tokens_BS, batch.position_ids_BS, mask, **asked)

        def loss(_, non_loss_data=False):
            return loss_function(index, batch, head_output(output))

        # megatron-core's schedule needs a tensor (with experts it reads its device); the other
        # outputs of the head are kept for the loss function.
        return output[0] if isinstance(output, tuple) else output, loss

    iterators = [iter(enumerate(batches)) for _ in models]
    local_tokens_BS = batches[0].tokens_BS
    return get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=iterators if len(models) > 1 else iterators[0],
        model=list(models) if len(models) > 1 else models[0],
        num_microbatches=len(batches),
        seq_length=local_tokens_BS.shape[1] * groups.cp_size,
        micro_batch_size=local_tokens_BS.shape[0],
        forward_only=forward_only,
        collect_non_loss_data=forward_only,
    )
