"""Run micro-batches through megatron-core's pipeline schedule: forward and backward, or forward only.

Shapes: B = sequences of one micro-batch, S = sequence length on this context-parallel rank.
"""

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import finalize_model_grads
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_slm.data.batch import Batch, hidden_from
from megatron_slm.model.router import scale_auxiliary_losses
from megatron_slm.parallel import Groups

LossFunction = Callable[
    [int, Batch, torch.Tensor | tuple[torch.Tensor, torch.Tensor]],
    tuple[torch.Tensor, torch.Tensor, dict],
]
"""(index of the micro-batch, batch, model output) -> (sum of weighted losses, divisor, report); divisor is a float64 0-d tensor."""


def forward_backward(
    models: list,
    batches: Sequence[Batch],
    loss_function: LossFunction,
    groups: Groups,
    *,
    divisor_ahead: torch.Tensor | None = None,
    head_weights: Sequence[torch.Tensor | None] | None = None,
) -> list[dict]:
    """Accumulate the gradient of (sum of losses over all micro-batches and ranks) / (sum of divisors), in main_grad.

    Equals, in one process: `(sum_m loss_sum_m / sum_m divisor_m).backward()`. The divisor is summed here in float64 and
    not through megatron-core's `num_tokens`, which is an integer: a float there raises on last-stage ranks only and hangs
    the others, and soft token weights need a float (docs/method.md#point-1, #point-2).
    Returns the reports of the last stage, else [].

    `divisor_ahead`: for models with experts, the divisors this rank's micro-batches will have (float64, 0-d; read on the last stage). With it the
    mean over micro-batches of the routers' auxiliary losses is added to what is differentiated (model/router.py).

    head_weights, where the choice is known: fp32 weight_BS per micro-batch on the last stage (None elsewhere). The head then computes tokens of
    non-zero weight only, and the model output given to loss_function is (sum of weight * loss, loss_BS with NaN for the others).
    """
    if divisor_ahead is not None:
        step_divisor = _over_ranks(divisor_ahead, groups)
        scale_auxiliary_losses(
            models, _one_for_zero(step_divisor) / (len(batches) * groups.dp_size)
        )
    divisor = torch.zeros((), dtype=torch.float64, device=groups.device)

    def counted_loss(index, batch, output):
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
        models, batches, counted_loss, groups, forward_only=False, head_weights=head_weights
    )


def _divide_gradients(chunks: list, divisor: torch.Tensor, groups: Groups) -> None:
    """Divide all gradients by the global divisor; with nothing selected anywhere those of the loss are already zero and stay so."""
    scale = (1.0 / _one_for_zero(_over_ranks(divisor, groups))).float()
    for chunk in chunks:
        chunk.scale_gradients(scale)


def _over_ranks(part: torch.Tensor, groups: Groups) -> torch.Tensor:
    """The sum over the last stage's data x context ranks of their parts, in place, on every rank of the job."""
    if groups.pp_size > 1:  # the divisor lives on the last stage; every stage's gradients need it
        dist.broadcast(part, group=groups.pp, group_src=groups.pp_size - 1)
    dist.all_reduce(part, group=groups.dp_cp)
    return part


def _one_for_zero(divisor: torch.Tensor) -> torch.Tensor:
    """1 in place of 0: a step that selected nothing has no loss to divide, and experts still learn to share the load."""
    return torch.where(divisor > 0, divisor, 1.0)


@torch.no_grad()
def forward_losses(
    models: list, batches: Sequence[Batch], groups: Groups, *, extras: tuple[str, ...] = ()
) -> list[dict[str, torch.Tensor]]:
    """Per-token losses without a graph: on the last pipeline stage one dict per batch, elsewhere [].

    Each dict has "loss" and every name in `extras` ("entropy", nats), each fp32 [B, S]. Equals
    `cross_entropy(logits, labels, reduction="none")` on fp32 logits. Dropout is off; the models' modes are restored.
    Every rank of the model-parallel group calls it with the same batches; batches may differ in shape only without pipeline parallelism.
    """
    training = [model.training for model in models]
    before = set_extra_outputs(models, tuple(extras))
    for model in models:
        model.eval()
    try:
        outputs = _run(
            models, batches, lambda index, batch, output: output, groups, forward_only=True
        )
    finally:
        set_extra_outputs(models, before)
        for model, mode in zip(models, training, strict=True):
            model.train(mode)
    return [split_outputs(output, extras) for output in outputs]


def set_extra_outputs(models: list, extras: tuple[str, ...]) -> tuple[str, ...]:
    """Make the models' labels-path give `extras` beside the loss from now on; returns what they gave before."""
    decoders = [
        get_attr_wrapped_model(model, "extra_outputs", return_model_obj=True) for model in models
    ]
    before = decoders[0].extra_outputs
    for decoder in decoders:
        decoder.extra_outputs = extras
    return before


def split_outputs(output: torch.Tensor, extras: tuple[str, ...]) -> dict[str, torch.Tensor]:
    """The model's labels-path output as {"loss": loss_BS, extra: value_BS ...}."""
    if not extras:
        return {"loss": output}
    return dict(zip(("loss", *extras), output.unbind(0), strict=True))


def _run(
    models: list,
    batches: Sequence[Batch],
    loss_function,
    groups: Groups,
    *,
    forward_only: bool,
    head_weights=None,
) -> list:
    def step(iterator, model):
        index, batch = next(iterator)
        mask = (
            None
            if batch.document_start_BS is None
            else hidden_from(batch.document_start_BS, groups.cp_rank, groups.cp_size)
        )
        output = model(
            batch.tokens_BS,
            batch.position_ids_BS,
            mask,
            labels=batch.labels_BS,
            loss_mask=None if head_weights is None else head_weights[index],
        )

        def loss(output, non_loss_data=False):
            return loss_function(index, batch, output)

        return output, loss

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
