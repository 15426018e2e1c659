"""megatron-core's DistributedDataParallel and mixed-precision AdamW around our model chunks."""

import torch

from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig as CoreOptimizerConfig
from megatron.core.optimizer import get_megatron_optimizer
from megatron.core.utils import get_model_config

from megatron_slm.config.schema import Config


def wrap_data_parallel(chunks: list[torch.nn.Module], config: Config) -> list[DistributedDataParallel]:
    """Wrap each chunk: gradients are summed in fp32 over data x context ranks and divided once, later, by our own count."""
    parallel = config.parallel
    ddp_config = DistributedDataParallelConfig(
        grad_reduce_in_fp32=True, overlap_grad_reduce=parallel.overlap_grad_reduce, overlap_param_gather=parallel.overlap_param_gather,
        use_distributed_optimizer=parallel.distributed_optimizer, check_for_nan_in_grad=False)
    return [DistributedDataParallel(get_model_config(chunk), ddp_config, chunk, disable_bucketing=i > 0) for i, chunk in enumerate(chunks)]


def build_optimizer(models: list[DistributedDataParallel], config: Config):
    """AdamW with decoupled weight decay (none on biases and norm weights), global-norm clipping, fp32 main weights.

    Transformer Engine's or apex's fused Adam where installed, else torch's (megatron-core chooses).
    `step()` returns (updated, grad_norm, zero_count).
    """
    settings = config.optimizer
    bf16 = config.device.precision == "bf16"
    optimizer = get_megatron_optimizer(CoreOptimizerConfig(
        optimizer="adam", lr=settings.learning_rate, min_lr=settings.min_learning_rate, weight_decay=settings.weight_decay,
        adam_beta1=settings.beta1, adam_beta2=settings.beta2, adam_eps=settings.epsilon, clip_grad=settings.clip_grad_norm,
        bf16=bf16, params_dtype=torch.bfloat16 if bf16 else torch.float32,
        use_distributed_optimizer=config.parallel.distributed_optimizer,
        overlap_param_gather=config.parallel.overlap_param_gather,
    ), models)
    for group in optimizer.param_groups:
        # megatron-core leaves this product to its own scheduler; without it norm weights would be decayed too.
        group["weight_decay"] = settings.weight_decay * group.get("wd_mult", 1.0)
    return optimizer


def set_learning_rate(optimizer, learning_rate: float) -> None:
    """Write the learning rate of the coming step into every parameter group, as lr_mult asks."""
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * group.get("lr_mult", 1.0)
