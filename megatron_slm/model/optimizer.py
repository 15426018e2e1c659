"""megatron-core's DistributedDataParallel and mixed-precision AdamW around our model chunks."""

import math
from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import ChainedOptimizer, MegatronOptimizer, get_megatron_optimizer
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.utils import get_attr_wrapped_model, get_model_config

from megatron_slm.config.overlap import decide_overlap
from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import data_parallel_size
from megatron_slm.model.decoder import head_weight
from megatron_slm.model.gradient_norm import clip_gradients, gradient_norm
from megatron_slm.model.outside_optimizer import MakeOptimizer, put_inside
from megatron_slm.model.transformer_config import DTYPES


def wrap_data_parallel(
    chunks: Sequence[torch.nn.Module], config: Config
) -> list[DistributedDataParallel]:
    """Wrap each chunk: gradients are summed in fp32 over data x context ranks, and divided once,
    later, by our own count.

    On a GPU the head, and Transformer Engine's layers, add their weights' gradients to the fp32
    sums themselves: no gradient in the model's precision is written, rounded and added.
    """
    on_gpu = next(chunks[0].parameters()).is_cuda
    ranks = data_parallel_size(config, dist.get_world_size()) * config.parallel.context
    overlap = decide_overlap(config, on_gpu=on_gpu, ranks=ranks)
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True,
        overlap_grad_reduce=overlap.grad_reduce,
        overlap_param_gather=overlap.param_gather,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        check_for_nan_in_grad=False,
    )
    models = [
        DistributedDataParallel(get_model_config(chunk), ddp_config, chunk, disable_bucketing=i > 0)
        for i, chunk in enumerate(chunks)
    ]
    for model in models:
        if on_gpu:
            accumulate_in_products(model)
        _wait_for_the_heads_weight(model)
    return models


def accumulate_in_products(model: DistributedDataParallel) -> None:
    """Let the head and Transformer Engine's layers add their gradients to main_grad.

    Transformer Engine needs no apex for it, but megatron-core builds no model with this fusion
    where apex is not: its own linear layers use apex's. So it is switched on after building.
    """
    decoder = get_attr_wrapped_model(model, "post_process", return_model_obj=True)
    decoder.accumulates_head_gradient = True
    for module in decoder.modules():
        if hasattr(module, "fuse_wgrad_accumulation"):
            module.fuse_wgrad_accumulation = True


def _wait_for_the_heads_weight(model: DistributedDataParallel) -> None:
    """Let the head wait until its weight is gathered, where gathers overlap with forward.

    megatron-core waits when the module that has a weight is called, and the selective head reads
    the output layer's weight without calling that layer. A weight with a bucket of its own (40
    million values) would be read while the other ranks' part of it is still arriving.
    """
    decoder = get_attr_wrapped_model(model, "post_process", return_model_obj=True)
    if model.ddp_config.overlap_param_gather and decoder.post_process:
        bucket = model.param_to_bucket_group[head_weight(decoder)]
        decoder.decoder.register_forward_hook(lambda *_: bucket.finish_param_sync())


def build_optimizer(
    models: list[DistributedDataParallel], config: Config, make: MakeOptimizer | None = None
):
    """AdamW with decoupled weight decay (none on biases and norm weights), global-norm clipping,
    fp32 main weights.

    Transformer Engine's or apex's fused Adam where installed (megatron-core chooses), else torch's,
    on a GPU its fused one.
    Under fp16 the models' losses are multiplied by a scale that follows overflows; use
    `update_weights` to step.
    make: an optimizer from outside in AdamW's place (outside_optimizer.py).
    """
    settings, precision = config.optimizer, config.device.precision
    optimizer = get_megatron_optimizer(
        CoreOptimizerConfig(
            optimizer="adam",
            lr=settings.learning_rate,
            min_lr=settings.min_learning_rate,
            weight_decay=settings.weight_decay,
            adam_beta1=settings.beta1,
            adam_beta2=settings.beta2,
            adam_eps=settings.epsilon,
            clip_grad=settings.clip_grad_norm,
            bf16=precision == "bf16",
            fp16=precision == "fp16",
            params_dtype=DTYPES[precision],
            initial_loss_scale=settings.initial_loss_scale,
            min_loss_scale=settings.min_loss_scale,
            loss_scale_window=settings.loss_scale_window_steps,
            hysteresis=settings.loss_scale_hysteresis_steps,
            use_distributed_optimizer=config.parallel.distributed_optimizer,
            overlap_param_gather=models[0].ddp_config.overlap_param_gather,
        ),
        models,
    )
    if make is not None:
        put_inside(optimizer, make, settings)
    elif torch.device(torch.cuda.current_device()).type == "cuda":
        fuse_updates(optimizer)
    for group in optimizer.param_groups:
        # megatron-core leaves this product to its own scheduler; without it norm weights would be
        # decayed too.
        group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
    if precision == "fp16":
        for model in models:
            get_model_config(model).grad_scale_func = optimizer.scale_loss
    return optimizer


def fuse_updates(optimizer: ChainedOptimizer) -> None:
    """Let torch's AdamW update all weights in a few kernels, which read and write each value once.

    torch's own choice on a GPU, `foreach`, takes a dozen passes over all weights and moments, and
    memory for intermediate values. The updates are the same up to rounding. Another optimizer than
    torch's AdamW, whose kernels are fused already, stays as it is. torch then counts updates on the
    device of the weights (checkpoint/optimizer_state.py).
    """
    for part in optimizer.chained_optimizers:
        if isinstance(getattr(part, "optimizer", None), torch.optim.AdamW):
            for group in part.optimizer.param_groups:
                group["fused"] = True


@torch.no_grad()
def update_weights(optimizer: ChainedOptimizer, learning_rate: float) -> tuple[bool, float]:
    """One AdamW update with this learning rate: (updated, gradient norm before clipping).

    Without an update weights and moments stay as they are. (False, nan): fp16 gradients overflowed,
    and the loss scale goes down (after the hysteresis). (False, norm): the norm is not finite.

    Equals megatron-core's ChainedOptimizer.step, which would let a NaN into every weight.
    """
    set_learning_rate(optimizer, learning_rate)
    overflowed = optimizer.prepare_grads()
    _share_overflows(_loss_scalers(optimizer))
    if overflowed:
        return False, math.nan
    grad_norm = gradient_norm(optimizer)
    if not math.isfinite(grad_norm):
        return False, grad_norm
    clip_gradients(optimizer, grad_norm)
    return optimizer.step_with_ready_grads(), grad_norm


def _share_overflows(scalers: list) -> None:
    """Give every scaler the state of the one with the smallest scale.

    megatron-core keeps one gradient scaler per chained optimizer (dense and expert weights), and
    each sees only its own overflows; the loss has one scale.
    """
    if len(scalers) < 2:
        return
    # On a tie, the lower hysteresis counter: it is the one that has just overflowed.
    smallest = min(
        (scaler.state_dict() for scaler in scalers),
        key=lambda state: (
            float(state["scale"]),
            state["hysteresis_tracker"],
            state["growth_tracker"],
        ),
    )
    for scaler in scalers:
        scaler.load_state_dict({**smallest, "scale": smallest["scale"].clone()})


def loss_scale(optimizer: MegatronOptimizer) -> float | None:
    """What the next step's losses are multiplied with; None without fp16."""
    scalers = _loss_scalers(optimizer)
    return float(scalers[0].scale) if scalers else None


def loss_scaler_state(optimizer: MegatronOptimizer) -> dict[str, float]:
    """The scale and its counters, JSON-able; {} without fp16."""
    scalers = _loss_scalers(optimizer)
    if not scalers:
        return {}
    return {name: float(value) for name, value in scalers[0].state_dict().items()}


def load_loss_scaler_state(optimizer: MegatronOptimizer, state: Mapping[str, float]) -> None:
    """Restore; a run that newly uses fp16 starts at its configured scale."""
    if not state:
        return
    for scaler in _loss_scalers(optimizer):
        scaler.load_state_dict(
            {
                "scale": torch.tensor([state["scale"]]),
                "growth_tracker": int(state["growth_tracker"]),
                "hysteresis_tracker": int(state["hysteresis_tracker"]),
            }
        )


def _loss_scalers(optimizer: MegatronOptimizer) -> list:
    optimizers = getattr(optimizer, "chained_optimizers", [optimizer])
    return [
        chained.grad_scaler
        for chained in optimizers
        if getattr(chained, "grad_scaler", None) is not None
    ]


def set_learning_rate(optimizer: MegatronOptimizer, learning_rate: float) -> None:
    """Write the learning rate of the coming step into every parameter group, times its lr_mult."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
