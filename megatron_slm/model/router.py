"""The router of a mixture of experts: megatron-core's, with auxiliary losses that do not depend on
the token selection, and with sums for metrics.

T tokens of a micro-batch on this rank, E experts, L layers of the whole model.
"""

from collections.abc import Iterator, Mapping, Sequence

import torch
import torch.distributed as dist
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe import moe_utils
from megatron.core.transformer.moe.moe_utils import MoEAuxLossAutoScaler, z_loss_func
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.utils import get_model_config
from torch import Tensor

from megatron_slm.parallel import Groups
from megatron_slm.selection.metric_sums import MetricSums

# RouterGatingLinearFunction uses this name even if Transformer Engine is not installed;
# megatron-core 0.16.1 does not define it then.
vars(moe_utils).setdefault("te_general_gemm", None)


class Router(TopKRouter):
    """Top-k routing of every token, selected or not, with losses whose gradient does not depend on
    the selection.

    The step's gradient equals that of, in one process,

        (sum of selected losses) / W
            + mean over micro-batches of sum over layers of (a * balance + z * z_loss)

    with W the selected weight of the step, a = load_balancing_coefficient,
    z = router_z_loss_coefficient and, over the tokens of a micro-batch (of each of its sequences,
    then the mean, with load_balancing: sequence),

        balance = E * sum_e (share of the top-k choices that fell on e)
                      * (mean over tokens of softmax(logits)_e)            1 when even
        z_loss  = mean over tokens of logsumexp(logits)^2

    All gradients are divided by W at the end of the step, so each loss is attached times
    W / micro-batches here: W must be known before backward. megatron-core's own factor, the rank's
    number of tokens, is for a division by all tokens; selecting 60 % of them would multiply the
    losses by 1 / 0.6, and in 0.16.1 it misses a factor tensor x context size
    (attach_and_log_load_balancing_loss counts the rank's tokens there, the sum runs over all).
    """

    auxiliary_scale: Tensor | None = None

    def __init__(self, config, pg_collection=None, **options):
        super().__init__(config, pg_collection, **options)
        # balance, z-loss, and the micro-batches they are of. Plain tensors: no part of the model's
        # state, and fp64 in a bf16 model too.
        self.losses_3 = torch.zeros(3, dtype=torch.float64, device=torch.cuda.current_device())
        self.tokens_E = torch.zeros(
            config.num_moe_experts, dtype=torch.float64, device=torch.cuda.current_device()
        )

    def routing(self, logits, padding_mask=None):
        probs_TE, chosen_TE = super().routing(logits, padding_mask)
        # This is true once per micro-batch, also under recomputation.
        if self.training and torch.is_grad_enabled():
            self.tokens_E += chosen_TE.sum(0)
            self.losses_3[2] += 1.0 / self.tp_cp_group.size()
        return probs_TE, chosen_TE

    def attach_and_log_load_balancing_loss(
        self, activation, aux_loss_coeff, aux_loss, *_names_and_groups, **_
    ):
        self.losses_3[0] += aux_loss.detach() / aux_loss_coeff
        return self._attached(activation, aux_loss)

    def apply_z_loss(self, logits, padding_mask=None):
        coefficient = self.config.moe_z_loss_coeff
        if coefficient is None or not (self.training and torch.is_grad_enabled()):
            return logits
        z_loss = z_loss_func(
            logits, coefficient / self.tp_cp_group.size(), padding_mask=padding_mask
        )
        self.losses_3[1] += z_loss.detach() / coefficient
        return self._attached(logits, z_loss)

    def _attached(self, activation, loss):
        if self.auxiliary_scale is None:
            raise RuntimeError(
                "a router in training mode needs scale_auxiliary_losses() before the forward pass; "
                "forward_backward() calls it"
            )
        return MoEAuxLossAutoScaler.apply(activation, loss * self.auxiliary_scale)

    def _apply_expert_bias(self, routing_map, padding_mask=None):
        """Expert bias is unused; skip megatron-core's torch.compiled no-op."""


def routers_of(models: Sequence[MegatronModule]) -> Iterator[Router]:
    """This rank's routers."""
    for model in models:
        yield from (module for module in model.modules() if isinstance(module, Router))


def scale_auxiliary_losses(models: Sequence[MegatronModule], scale: Tensor) -> None:
    """Multiply the auxiliary losses of every following micro-batch by `scale` (0-d)."""
    for router in routers_of(models):
        router.auxiliary_scale = scale.float()


def has_auxiliary_losses(models: Sequence[MegatronModule]) -> bool:
    """Whether the step must know its divisor before backward; the same on every rank."""
    config = get_model_config(models[0])
    return config.num_moe_experts is not None and bool(
        config.moe_aux_loss_coeff or config.moe_z_loss_coeff
    )


def pop_router_metrics(models: Sequence[MegatronModule], groups: Groups) -> MetricSums:
    """(sum, count) pairs of what the routers counted since the last call, as the part of this data
    x context rank in the metrics; {} off the last stage and for a model without experts.

    moe/load_balancing_loss, moe/router_z_loss
        over layers and micro-batches, without their coefficients
    moe/tokens_per_expert [L * E]
        tokens sent to each expert, out of all of the layer

    Two small sums, over the tensor and the pipeline group; every rank calls it.
    """
    config = get_model_config(models[0])
    if config.num_moe_experts is None:
        return {}
    counts_L = torch.zeros(
        config.num_layers, 3 + config.num_moe_experts, dtype=torch.float64, device=groups.device
    )
    for router in routers_of(models):
        counts_L[router.layer_number - 1] = torch.cat([router.losses_3, router.tokens_E])
        router.losses_3.zero_()
        router.tokens_E.zero_()
    for group in (groups.tp, groups.pp):
        if group.size() > 1:
            dist.all_reduce(counts_L, group=group)
    if not groups.is_last_stage:
        return {}
    balance, z_loss, micro_batches = counts_L[:, :3].sum(0)
    tokens_LE = counts_L[:, 3:]
    tokens_of_layer_LE = tokens_LE.sum(1, keepdim=True).expand_as(tokens_LE)
    measured = {"moe/tokens_per_expert": (tokens_LE.flatten(), tokens_of_layer_LE.flatten())}
    if config.moe_aux_loss_coeff:
        measured["moe/load_balancing_loss"] = (balance, micro_batches)
    if config.moe_z_loss_coeff:
        measured["moe/router_z_loss"] = (z_loss, micro_batches)
    return measured


def summarise_routing(
    reduced: Mapping[str, tuple[Tensor, Tensor]], layers: int, experts: int
) -> dict[str, float]:
    """moe/load_imbalance: tokens of a layer's busiest expert / its mean expert, mean over layers;
    moe/load_imbalance_worst: of the worst layer.
    """
    if "moe/tokens_per_expert" not in reduced:
        return {}
    tokens_LE = reduced["moe/tokens_per_expert"][0].view(layers, experts)
    imbalance_L = tokens_LE.amax(1) / tokens_LE.mean(1).clamp(min=1.0)
    return {
        "moe/load_imbalance": float(imbalance_L.mean()),
        "moe/load_imbalance_worst": float(imbalance_L.max()),
    }
