"""What only the torch-native layers compute: with it, auto never means Transformer Engine's."""

from collections.abc import Iterator
from typing import Any, NamedTuple

from megatron_slm.config.architecture import ROPE_WITH_ATTENTION_FACTOR
from megatron_slm.config.schema import Config


class TorchOnly(NamedTuple):
    """One setting that Transformer Engine's layers do not have here."""

    setting: str
    value: Any
    why: str
    """What they lack, after "Transformer Engine: "."""


def torch_only_settings(config: Config) -> list[TorchOnly]:
    """Every setting of `config` that makes device.layers auto mean the torch-native layers.

    The programs that build a model, the plan and the start table ask here, and the rules refuse
    each of these together with device.layers transformer_engine or fp8 products.
    """
    data, model = config.data, config.model
    needs: dict[str, tuple[bool, str]] = {
        "data.document_policy": (
            data.document_policy == "isolated",
            "its attention takes no mask of isolated documents",
        ),
        "model.norm_placement": (
            model.norm_placement != "before",
            "its layers have no norm after attention and the feed-forward layer",
        ),
        "model.qk_norm_over": (
            model.qk_norm and model.qk_norm_over == "all_heads",
            "its layers have no norm over all heads of queries and keys",
        ),
        "model.zero_centered_norms": (
            model.zero_centered_norms,
            "its zero-centered norms are not connected here",
        ),
        "model.rope_base_windowed": (
            model.rope_base_windowed > 0,
            "its layers have one rotary embedding for all",
        ),
        "model.layers_without_rope": (
            bool(model.layers_without_rope) and model.rope_scaling in ROPE_WITH_ATTENTION_FACTOR,
            "all its layers multiply queries and keys by rope_attention_factor, those that are "
            "not rotated too",
        ),
    }
    return [
        TorchOnly(setting, _value(config, setting), why)
        for setting, (needed, why) in needs.items()
        if needed
    ]


def _value(config: Config, setting: str) -> Any:
    section, name = setting.split(".")
    return getattr(getattr(config, section), name)


def layer_engine_problems(config: Config, world_size: int) -> Iterator[str]:
    """A rule between settings (config/check.py)."""
    device = config.device
    for setting, value, why in torch_only_settings(config):
        if device.layers == "transformer_engine":
            yield (
                f"{setting}: got {value} with device.layers transformer_engine; {why}: set "
                "device.layers to auto or torch"
            )
        if device.fp8 != "none":
            yield (
                f"device.fp8: got {device.fp8} with {setting} {value}, which needs the "
                "torch-native layers; fp8 needs Transformer Engine's: choose one"
            )
