"""Parts of a model that have no fused pass are named in the start table (what else is in it:
tests/unit/test_device.py).
"""

import pytest
import torch

from megatron_slm.config.schema import DeviceConfig, ModelConfig
from megatron_slm.device import Device
from megatron_slm.training.acceleration_rows import acceleration_rows


@pytest.mark.parametrize(
    "changes, feature, state, why",
    [
        (dict(normalization="layernorm"), "fused norm", "torch", ""),
        (dict(rope_fraction=0.25), "fused rotary embedding", "off", "model.rope_fraction is 0.25"),
        (dict(position_embedding="learned"), "fused rotary embedding", "absent", "learned"),
        (dict(activation="gelu"), "fused activation", "off", "gated gelu has no fused pass"),
        (dict(gated_feed_forward=False), "fused activation", "off", "silu has no fused pass"),
        (dict(feed_forward_bias=True), "fused SwiGLU", "torch.compile", "adds no bias"),
    ],
)
def test_the_start_table_says_which_parts_have_no_triton_pass(changes, feature, state, why):
    cuda = Device("cuda", torch.device("cuda"), "nccl")
    table = acceleration_rows(cuda, "torch", DeviceConfig(), model=ModelConfig(**changes))
    rows = {name: (found, reason) for name, found, reason in table}
    assert rows[feature][0] == state
    assert why in rows[feature][1]
