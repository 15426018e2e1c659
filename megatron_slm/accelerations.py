"""What is installed to make a GPU faster: Transformer Engine, NVIDIA's apex, fp8 products.

The start table (training/acceleration_rows.py) shows which of these a run uses, and why not the
others.
"""

import importlib.metadata
import importlib.util
from collections.abc import Callable
from typing import Any

import torch

FP8_CAPABILITY = (8, 9)
MXFP8_CAPABILITY = (10, 0)


def has_module(name: str) -> bool:
    """Whether a module can be found, without importing it."""
    return importlib.util.find_spec(name) is not None


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch layers can be imported."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:  # a broken build raises anything, from ImportError to OSError
        return False
    return True


def apex_state() -> str:
    """What the module `apex` is here.

    "nvidia"            NVIDIA's apex with its CUDA extensions
    "nvidia_python"     NVIDIA's apex, built without them
    "foreign"           the unrelated project of that name on PyPI (a Pyramid toolkit); NVIDIA's is
                        only built from its source, see the Dockerfile
    "absent"            not installed
    """
    if not has_module("apex"):
        return "absent"
    if not has_module("apex.optimizers") and not has_module("apex.multi_tensor_apply"):
        return "foreign"
    return "nvidia" if has_module("amp_C") else "nvidia_python"


def apex_version() -> str:
    """The version of whatever `apex` is installed."""
    try:
        return importlib.metadata.version("apex")
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"


def apex_rms_norm() -> Callable[..., Any] | None:
    """apex's fused RMSNorm as function(input, weight, normalized_shape, epsilon).

    None where its CUDA extension is not built.
    """
    if (
        torch.cuda.is_available()
        and apex_state() == "nvidia"
        and has_module("fused_layer_norm_cuda")
    ):
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine
    return None


def fused_layers_problem(on_gpu: bool, layers: str, setting: str) -> str:
    """Why the torch-native layers do not use the Triton passes of ops.layer_passes; "" = they do.

    layers: torch or transformer_engine. setting: device.fused_layers.
    """
    if layers != "torch":
        return "the layers are Transformer Engine's"
    if not on_gpu:
        return "no CUDA"
    if setting == "none":
        return "device.fused_layers is none"
    return "" if has_module("triton") else "triton is not installed"


def transformer_engine_swiglu() -> type[torch.nn.Module] | None:
    """Transformer Engine's SwiGLU(): silu(first half) * second half, one pass each way.

    None where it is not installed, and in versions before 1.13.
    """
    if not has_transformer_engine():
        return None
    import transformer_engine.pytorch as engine

    return getattr(getattr(engine, "ops", None), "SwiGLU", None)


def fp8_problem(layers: str, recipe: str) -> str:
    """Why fp8 products are not available here; "" when they are."""
    if layers != "transformer_engine":
        return "the layers are torch-native (fp8 needs Transformer Engine on a GPU)"
    capability = torch.cuda.get_device_capability()
    needed = MXFP8_CAPABILITY if recipe == "mxfp8" else FP8_CAPABILITY
    if capability < needed:
        return (
            f"this GPU has compute capability {'.'.join(map(str, capability))}, "
            f"and {recipe} fp8 needs {'.'.join(map(str, needed))}"
        )
    return ""
