"""fp8 operands on any device, by rounding: an emulation for tests, without fp8 products.

Transformer Engine's recipe `tensorwise` scales each operand of a product so that its largest value
becomes the largest of e4m3 (448), rounds it, multiplies with fp32 sums and scales back. Here the
operands are rounded the same way and multiplied in the model's own precision. What it does not show
is the accumulation of fp8 tensor cores, which keeps fewer bits than fp32, and any speed.
"""

import torch
from torch import Tensor
from torch.nn import Module

E4M3_LARGEST = 448.0


def rounded_to_e4m3(values: Tensor) -> Tensor:
    """The values as e4m3 with one scale for all of them gives them back, in their own dtype."""
    largest = values.detach().abs().amax().float()
    if largest == 0:
        return values
    scale = E4M3_LARGEST / largest
    return ((values.float() * scale).to(torch.float8_e4m3fn).float() / scale).to(values.dtype)


def emulate_fp8_products(models: list[Module]) -> list[Module]:
    """Round weights and inputs of every linear in the transformer layers; returns the same models.

    As with Transformer Engine the embedding, the norms, the attention core and the head stay as
    they are. For forward passes only: the weights themselves are rounded.
    """
    count = 0
    for model in models:
        for name, module in model.named_modules():
            weight = getattr(module, "weight", None)
            if ".layers." not in f".{name}" or weight is None or weight.dim() != 2:
                continue
            with torch.no_grad():
                weight.copy_(rounded_to_e4m3(weight))
            module.register_forward_pre_hook(_round_input)
            count += 1
    if not count:
        raise ValueError("these models have no linear in a transformer layer to round")
    return models


def _round_input(module: Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    return (rounded_to_e4m3(inputs[0]), *inputs[1:])
