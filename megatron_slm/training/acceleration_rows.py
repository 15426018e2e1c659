"""The rows of the start table about accelerations: which are on, and why the others are off."""

from megatron_slm.accelerations import (
    apex_state,
    apex_version,
    fused_layers_problem,
    has_module,
    has_transformer_engine,
    transformer_engine_swiglu,
)
from megatron_slm.config.schema import DeviceConfig, ModelConfig
from megatron_slm.device import Device

Row = tuple[str, str, str]
"""Feature, state, and why it is not on ("" = it is)."""


def acceleration_rows(
    device: Device,
    layers: str,
    settings: DeviceConfig,
    engine_lacks: str = "",
    optimizer: str = "adamw",
    model: ModelConfig | None = None,
) -> list[Row]:
    """Every row about the device and its accelerations.

    layers: torch or transformer_engine. settings: the device section. engine_lacks: why the run
    needs the torch-native layers; "" = it does not. optimizer: optimizer.kind. model: the model
    section; None = its defaults.
    """
    model = model or ModelConfig()
    on_gpu = device.kind == "cuda"
    apex = apex_state()
    return [
        ("device", device.kind, f"{device.backend} collectives"),
        _layers_row(on_gpu, layers, engine_lacks),
        _norm_row(on_gpu, layers, settings, apex, model),
        _rotary_row(on_gpu, layers, settings, model),
        _activation_row(on_gpu, layers, settings, model),
        _optimizer_row(on_gpu, apex) if optimizer == "adamw" else ("optimizer", optimizer, ""),
        _fusion_row(on_gpu, layers, apex),
        _fp8_row(on_gpu, layers, settings),
        ("apex", apex.replace("_", " "), _describe_apex(apex)),
    ]


def _describe_apex(state: str) -> str:
    if state == "foreign":
        return (
            f"the 'apex' installed here ({apex_version()}) is an unrelated PyPI project: "
            "pip uninstall apex, and build NVIDIA's as the Dockerfile does"
        )
    return {
        "absent": "not installed",
        "nvidia": "NVIDIA apex with CUDA extensions",
        "nvidia_python": (
            "NVIDIA apex WITHOUT its CUDA extensions: rebuild it as the Dockerfile does"
        ),
    }[state]


def _layers_row(on_gpu: bool, layers: str, engine_lacks: str) -> Row:
    if layers == "transformer_engine":
        return "layers", "Transformer Engine", ""
    if not on_gpu:
        why = "device is the CPU"
    elif not has_transformer_engine():
        why = "not installed"
    elif engine_lacks:
        why = engine_lacks
    else:
        why = "device.layers asks for torch"
    return "layers", "torch-native", f"Transformer Engine: {why}"


def _norm_row(
    on_gpu: bool, layers: str, settings: DeviceConfig, apex: str, model: ModelConfig
) -> Row:
    feature = "fused norm"
    if layers == "transformer_engine":
        return feature, "Transformer Engine", ""
    if model.normalization == "layernorm":
        return feature, "torch", ""  # its LayerNorm is one pass everywhere
    has_factor = not model.zero_centered_norms  # apex's kernel multiplies by the weight itself
    if on_gpu and apex == "nvidia" and has_module("fused_layer_norm_cuda") and has_factor:
        return feature, "apex", ""
    why = fused_layers_problem(on_gpu, layers, settings.fused_layers)
    if not why:
        return feature, "Triton", ""
    if not on_gpu:
        return feature, "off", why
    if not has_factor:
        return feature, "off", f"{why}; apex: it has no zero-centered RMSNorm"
    if apex != "nvidia":
        return feature, "off", f"{why}; apex: {_describe_apex(apex)}"
    return feature, "off", f"{why}; apex: built without --cuda_ext layer norms"


def _rotary_row(on_gpu: bool, layers: str, settings: DeviceConfig, model: ModelConfig) -> Row:
    feature = "fused rotary embedding"
    if model.position_embedding != "rope":
        return feature, "absent", f"model.position_embedding is {model.position_embedding}"
    if layers == "transformer_engine":
        return feature, "Transformer Engine", ""
    why = fused_layers_problem(on_gpu, layers, settings.fused_layers)
    if not why and model.rope_fraction < 1:
        why = f"the Triton pass turns whole heads; model.rope_fraction is {model.rope_fraction}"
    return feature, "off" if why else "Triton", why


def _activation_row(on_gpu: bool, layers: str, settings: DeviceConfig, model: ModelConfig) -> Row:
    """Of the feed-forward layer."""
    if model.activation != "silu" or not model.gated_feed_forward:
        gated = "gated " if model.gated_feed_forward else ""
        why = f"{gated}{model.activation} has no fused pass here, SwiGLU alone has"
        return "fused activation", "off", why if on_gpu else "no CUDA"
    return _swiglu_row(on_gpu, layers, settings, model)


def _swiglu_row(on_gpu: bool, layers: str, settings: DeviceConfig, model: ModelConfig) -> Row:
    feature = "fused SwiGLU"
    if not on_gpu:
        return feature, "off", "no CUDA"
    if layers == "transformer_engine":
        if model.experts:
            why = "Transformer Engine's does not weigh the tokens of experts"
        elif transformer_engine_swiglu() is None:
            why = "Transformer Engine has one from version 1.13 on"
        else:
            return feature, "Transformer Engine", ""
        return feature, "torch.compile", why
    why = fused_layers_problem(on_gpu, layers, settings.fused_layers)
    if not why and model.experts:
        why = "the Triton pass does not weigh the tokens of experts"
    if not why and model.feed_forward_bias:
        why = "the Triton pass adds no bias"
    return feature, "torch.compile" if why else "Triton", why


def _optimizer_row(on_gpu: bool, apex: str) -> Row:
    if not on_gpu:
        return "optimizer", "AdamW, torch", "no CUDA"
    if has_transformer_engine():
        return "optimizer", "AdamW, Transformer Engine", ""
    if apex == "nvidia":
        return "optimizer", "AdamW, apex", ""
    why = "neither Transformer Engine nor NVIDIA apex is installed"
    return "optimizer", "AdamW, torch, fused", why


def _fusion_row(on_gpu: bool, layers: str, apex: str) -> Row:
    feature = "gradient-accumulation fusion"
    if not on_gpu:
        return feature, "off", "no CUDA"
    if layers == "transformer_engine":
        return feature, "Transformer Engine", ""
    if has_module("fused_weight_gradient_mlp_cuda"):
        return feature, "apex", ""
    return feature, "head only", f"layers need apex: {_describe_apex(apex)}"


def _fp8_row(on_gpu: bool, layers: str, settings: DeviceConfig) -> Row:
    if settings.fp8 != "none":
        return "fp8", f"{settings.fp8}, {settings.fp8_recipe} scaling", ""
    if not on_gpu:
        return "fp8", "off", "no CUDA"
    if layers == "torch":
        return "fp8", "off", "it needs Transformer Engine layers"
    return "fp8", "off", "device.fp8 is none"
