"""The kernels of the layers compile for a GPU (compute capability 9.0) without one.

The interpreter takes what the compiler refuses, types above all.
"""

import pytest
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from megatron_slm.ops import rms_norm_triton, rotary_triton, row_moves_triton, swiglu_triton

KERNELS = {
    "norm forward": (rms_norm_triton._forward_kernel, {"ROWS": 1, "COLUMNS": 2048}, 4),
    "norm backward": (rms_norm_triton._backward_kernel, {"ROWS": 1, "COLUMNS": 8192}, 16),
    "short norm": (rms_norm_triton._backward_kernel, {"ROWS": 16, "COLUMNS": 128}, 4),
    "rows with a gradient": (row_moves_triton._has_gradient_kernel, {"BLOCK": 1024}, 4),
    "gathered rows": (row_moves_triton._take_kernel, {"BLOCK": 1024}, 4),
    "rows put back": (row_moves_triton._spread_kernel, {"ADD": True, "BLOCK": 1024}, 4),
    "swiglu forward": (swiglu_triton._forward_kernel, {"BLOCK": 1024}, 4),
    "swiglu backward": (swiglu_triton._backward_kernel, {"BLOCK": 1024}, 4),
    "rotary": (
        rotary_triton._turn_kernel,
        {"BACKWARD": False, "VALUES": False, "HEADS": 32, "HALF": 32},
        4,
    ),
    "split rotary": (
        rotary_triton._turn_kernel,
        {"BACKWARD": True, "VALUES": True, "HEADS": 16, "HALF": 64},
        4,
    ),
}
KINDS = dict.fromkeys(
    "hidden weight normed grad d_hidden joint gated d_joint "
    "query key value to_query to_key to_value source taken values total".split(),
    "*bf16",
)
KINDS |= dict.fromkeys(("scale", "d_weight", "cosine", "sine"), "*fp32")
KINDS |= {"found": "*u8", "index": "*i64", "place": "*i64"}
KINDS |= {"epsilon": "fp32", "strides": ("i32",) * 10, "to_strides": ("i32",) * 10}
"""Types of the kernels' arguments; the others are sizes."""


@pytest.mark.parametrize("case", KERNELS)
def test_kernel_compiles_and_keeps_its_tile_in_registers(case):
    kernel, constants, warps = KERNELS[case]
    signature = {
        name: "constexpr" if name in constants else KINDS.get(name, "i32")
        for name in kernel.arg_names
    }
    source = ASTSource(
        fn=kernel,
        signature=signature,
        constexprs={(kernel.arg_names.index(key),): value for key, value in constants.items()},
    )
    compiled = triton.compile(
        source, target=GPUTarget("cuda", 90, 32), options={"num_warps": warps}
    )
    assert ".entry" in compiled.asm["ptx"]
    assert "ld.local" not in compiled.asm["ptx"]
