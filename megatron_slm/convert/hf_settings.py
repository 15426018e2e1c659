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
from megatron_slm.convert.families.rope import ROPE_KEYS
from megatron_slm.convert.hf_keys import key_problems


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
        raise ValueError(_refusal(error.problems)) from None
    return model, theirs.max_position_embeddings


def _refusal(problems: list[str]) -> str:
    return "this Hugging Face model cannot be expressed here: " + "; ".join(problems)


def read_by_transformers(config: Mapping[str, Any]) -> Any:
    """The configuration object of transformers for a config.json of one of the families.

    ValueError: transformers refuses it.
    """
    # This takes seconds, so it waits until the keys have been looked at.
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    # null is a value where the default is none (Mistral's sliding_window), not for the rotary keys.
    settings = {
        key: value for key, value in config.items() if value is not None or key not in ROPE_KEYS
    }
    try:
        return CONFIG_MAPPING[config["model_type"]].from_dict(settings)
    except Exception as error:
        # Its checks raise ValueError, TypeError, KeyError or a class of huggingface_hub's own.
        raise ValueError(f"transformers cannot read it: {error}") from None
