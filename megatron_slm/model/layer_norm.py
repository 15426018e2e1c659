"""LayerNorm as a torch-native layer, in the place that RMSNorm of layers.py has in other models."""

import torch
from megatron.core.transformer import TransformerConfig
from torch import Tensor
from torch.nn import functional as F


class LayerNorm(torch.nn.Module):
    """torch.nn.functional.layer_norm (Ba, Kiros and Hinton, arXiv 1607.06450) with weight and bias.

    Input and result have the dtype of the weight; torch's kernel takes mean and variance in fp32
    and rounds once, in one pass over the hidden state on a CPU and on a GPU, so that no other fused
    version is looked for.

    Under sequence parallelism each tensor rank sees other positions, so the gradients of weight and
    bias must be summed over the tensor group; megatron-core does that for what has
    `sequence_parallel` set (_allreduce_non_tensor_model_parallel_grads).
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        **_ignored_by_megatron_norms,
    ):
        super().__init__()
        self.epsilon = eps
        made = {"dtype": config.params_dtype, "device": torch.cuda.current_device()}
        self.weight = torch.nn.Parameter(torch.ones(hidden_size, **made))
        self.bias = torch.nn.Parameter(torch.zeros(hidden_size, **made))
        for parameter in (self.weight, self.bias):
            vars(parameter)["sequence_parallel"] = config.sequence_parallel

    def forward(self, hidden: Tensor) -> Tensor:
        return F.layer_norm(hidden, hidden.shape[-1:], self.weight, self.bias, self.epsilon)
