"""Our settings of the model that a config.json describes.

Keys that are absent have the default of transformers' own configuration class of that family, which
differs between families (Mixtral's rope_theta is 1e6) and between classes of one name.
"""

from collections.abc import Mapping
from typing import Any

from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config, DataConfig, ModelConfig
from megatron_slm.convert.families.registry import family_of
from megatron_slm.convert.families.rope import NUMBER_KEYS, ROPE_KEYS
from megatron_slm.convert.hf_keys import key_problems

_ROPE = ("rope_parameters",)
_THEIR_KEYS = {
    "model.query_groups": ("num_key_value_heads",),
    "model.norm_epsilon": ("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon"),
    "model.rope_base": ("rotary_emb_base", "rope_theta"),
    "model.rope_base_windowed": ("rope_local_base_freq", *_ROPE),
    "model.rope_fraction": ("rotary_pct",),
    "model.experts_per_token": ("num_experts_per_tok",),
    **dict.fromkeys(
        (
            "model.rope_scaling_factor",
            "model.rope_low_frequency_factor",
            "model.rope_beta_slow",
            "model.rope_original_sequence_length",
        ),
        _ROPE,
    ),
}
"""Settings that a check may refuse, and the keys that families have for them, the one to name
first."""


def model_config(config: dict) -> tuple[ModelConfig, int]:
    """(ModelConfig, sequence length) that compute what a config.json describes.

    ValueError naming every setting that there is no place for.
    """
    family = family_of(config.get("model_type"))
    problems = [*key_problems(config, family.keys), *family.file_problems(config)]
    if problems:
        raise ValueError(_refusal(problems))
    theirs = read_by_transformers(config)
    if problems := list(family.problems(theirs)):
        raise ValueError(_refusal(problems))
    model = ModelConfig(**family.fixed, **family.settings(theirs))
    try:
        # A table of learned positions must reach as far as sequences do.
        data = DataConfig(sequence_length=theirs.max_position_embeddings)
        check_config(Config(model=model, data=data), world_size=1, training=False)
    except ConfigError as error:
        named = (problem + _their_key(problem, family.keys) for problem in error.problems)
        raise ValueError(_refusal([*named])) from None
    return model, theirs.max_position_embeddings


def _their_key(problem: str, keys: frozenset[str]) -> str:
    """The key of config.json that a problem of our settings is about, where names differ."""
    found = [key for key in _THEIR_KEYS.get(problem.split(":")[0], ()) if key in keys]
    return f" (in config.json: {found[0]})" if found else ""


def _refusal(problems: list[str]) -> str:
    return "this Hugging Face model cannot be expressed here: " + "; ".join(problems)


def read_by_transformers(config: Mapping[str, Any]) -> Any:
    """The configuration object of transformers for a config.json of one of the families.

    ValueError: transformers refuses it.
    """
    # This takes seconds, so it waits until the keys have been looked at.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # null is a value where the default is none (Mistral's sliding_window), not for the rotary keys.
    not_set = (*ROPE_KEYS, *NUMBER_KEYS)
    settings = {
        key: value for key, value in config.items() if value is not None or key not in not_set
    }
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(settings)
    except Exception as error:
        # Its checks raise ValueError, TypeError, KeyError or a class of huggingface_hub's own.
        raise ValueError(f"transformers cannot read it: {error}") from None
