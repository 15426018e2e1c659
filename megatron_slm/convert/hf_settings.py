"""Our settings of the model that a config.json describes.

Keys that are absent have the default of transformers' own configuration class of that family, which
differs between families (Mixtral's rope_theta is 1e6) and between classes of one name.
"""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError
from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.convert.hf_keys import MODEL_TYPES, ROPE_KEYS, key_problems

ROPE_FIELDS = {
    "default": (),
    "linear": ("factor",),
    "llama3": (
        "factor",
        "low_freq_factor",
        "high_freq_factor",
        "original_max_position_embeddings",
    ),
    "yarn": ("factor", "original_max_position_embeddings"),
}
"""The kinds of rotary scaling that are implemented, with the numbers that each reads."""
FULL, WINDOWED = "full_attention", "sliding_attention"
"""The kinds of layers, as layer_types names them."""
WINDOWED_BY_LAYER = ("ministral", "qwen2", "qwen3")
"""The families whose layers follow layer_types; in the others all layers have the window."""
_YARN_OPTIONS = ("beta_fast", "beta_slow", "attention_factor")
_ROPE_ALWAYS = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")


def model_config(config: dict) -> tuple[ModelConfig, int]:
    """(ModelConfig, sequence length) that compute what a config.json describes.

    ValueError naming every setting that there is no place for.
    """
    model_type = config.get("model_type")
    if model_type not in MODEL_TYPES:
        raise ValueError(
            f"this Hugging Face model cannot be expressed here: model_type {model_type!r}; "
            f"expected one of {', '.join(MODEL_TYPES)}"
        )
    problems = [*key_problems(config), *_rope_problems(config)]
    if problems:
        raise ValueError(_refusal(problems))
    theirs = read_by_transformers(config)
    if problems := list(_class_problems(theirs)):
        raise ValueError(_refusal(problems))
    model = ModelConfig(
        layers=theirs.num_hidden_layers,
        hidden_size=theirs.hidden_size,
        ffn_hidden_size=(
            theirs.moe_intermediate_size if model_type == "qwen3_moe" else theirs.intermediate_size
        ),
        attention_heads=theirs.num_attention_heads,
        query_groups=theirs.num_key_value_heads or theirs.num_attention_heads,
        head_size=_head_size(theirs),
        vocabulary_size=theirs.vocab_size,
        **_window_settings(theirs),
        **_rope_settings(theirs.rope_parameters),
        norm_epsilon=theirs.rms_norm_eps,
        tied_embeddings=theirs.tie_word_embeddings,
        qkv_bias=model_type == "qwen2",
        qk_norm=model_type in ("qwen3", "qwen3_moe"),
        **_expert_settings(theirs),
        initialization_std=theirs.initializer_range,
    )
    try:
        check_config(Config(model=model), world_size=1, training=False)
    except ConfigError as error:
        raise ValueError(_refusal(error.problems)) from None
    return model, theirs.max_position_embeddings


def _refusal(problems: list[str]) -> str:
    return "this Hugging Face model cannot be expressed here: " + "; ".join(problems)


def read_by_transformers(config: Mapping[str, Any]) -> Any:
    """The configuration object of transformers for a config.json of one of MODEL_TYPES.

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


def _rope_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """What config.json says twice, or what nothing here computes, of the rotary embedding."""
    given = {key: config[key] for key in ("rope_parameters", "rope_scaling") if config.get(key)}
    for key, rope in given.items():
        if not isinstance(rope, Mapping):
            yield f"{key} {rope!r}: expected a mapping"
            return
    if len(given) == 2 and given["rope_parameters"] != given["rope_scaling"]:
        # transformers 5 takes rope_scaling, and its default for a rope_theta that stands in the
        # other only; other versions may not.
        yield (
            f"both rope_parameters {given['rope_parameters']} and rope_scaling "
            f"{given['rope_scaling']} are given: write everything into one of them"
        )
    bases = {rope["rope_theta"] for rope in given.values() if "rope_theta" in rope}
    if config.get("rope_theta") is not None:
        bases.add(config["rope_theta"])
    if len(bases) > 1:
        yield f"rope_theta is given as {' and as '.join(map(str, sorted(bases)))}: keep one of them"
    for key, rope in given.items():
        yield from _scaling_problems(key, rope)


def _scaling_problems(key: str, rope: Mapping[str, Any]) -> Iterator[str]:
    kinds = {rope[name] for name in ("rope_type", "type") if rope.get(name) is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ROPE_FIELDS:
        yield (
            f"rotary scaling {kind!r} ({key} says {dict(rope)}); implemented are linear, llama3 "
            "and yarn"
        )
        return
    for name in ROPE_FIELDS[kind]:
        if name != "original_max_position_embeddings" and rope.get(name) is None:
            yield f"{key} of the kind {kind} lacks {name}"
    for name, value in rope.items():
        no_effect = (name, value) in (("partial_rotary_factor", 1.0), ("truncate", True))
        optional = _YARN_OPTIONS if kind == "yarn" else ()
        known = name in (*_ROPE_ALWAYS, *ROPE_FIELDS[kind], *optional) or no_effect
        if value is not None and not known:
            yield f"{key} has {name} {value!r}, which the kind {kind} does not read here"


def _rope_settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rope_* fields of ModelConfig for rope_parameters that _rope_problems has passed."""
    settings: dict[str, Any] = {"rope_base": float(rope["rope_theta"])}
    kind = rope["rope_type"]
    if kind == "default":
        return settings
    settings |= {"rope_scaling": kind, "rope_scaling_factor": float(rope["factor"])}
    if kind == "llama3":
        settings |= {
            "rope_low_frequency_factor": float(rope["low_freq_factor"]),
            "rope_high_frequency_factor": float(rope["high_freq_factor"]),
            "rope_original_sequence_length": int(rope["original_max_position_embeddings"]),
        }
    if kind == "yarn":
        settings |= {
            "rope_original_sequence_length": int(rope["original_max_position_embeddings"]),
            "rope_beta_fast": float(rope.get("beta_fast") or 32),
            "rope_beta_slow": float(rope.get("beta_slow") or 1),
            "rope_attention_factor": float(rope.get("attention_factor") or 0),
        }
    return settings


def _class_problems(theirs: Any) -> Iterator[str]:
    """What the decoder here does not have, of values whose default a family's class decides."""
    if theirs.hidden_act not in ("silu", "swish"):
        yield f"hidden_act {theirs.hidden_act!r}; expected silu (or its other name, swish)"
    if theirs.model_type == "qwen3_moe" and (
        theirs.mlp_only_layers or theirs.decoder_sparse_step != 1
    ):
        yield "dense layers among those of experts (mlp_only_layers or decoder_sparse_step)"
    yield from _window_problems(theirs)


def _window_problems(theirs: Any) -> Iterator[str]:
    """Kinds of layers that contradict sliding_window, or that are not implemented."""
    window = getattr(theirs, "sliding_window", None)
    layers = getattr(theirs, "layer_types", None) or []
    kinds = sorted({*layers} - {FULL, WINDOWED})
    if kinds:
        yield f"layer_types {', '.join(kinds)}; implemented are {FULL} and {WINDOWED}"
    if theirs.model_type not in WINDOWED_BY_LAYER:
        of_every_layer = FULL if window is None else WINDOWED
        if {*layers} - {of_every_layer, *kinds}:
            yield (
                f"layer_types with sliding_window {window}: in a {theirs.model_type} every layer "
                f"is of {of_every_layer}"
            )
    elif WINDOWED in layers and window is None:
        yield f"layer_types names {WINDOWED}, but sliding_window is not set, or not used"
    elif len(layers) != theirs.num_hidden_layers:
        yield f"layer_types is of {len(layers)} layers, the model of {theirs.num_hidden_layers}"


def _window_settings(theirs: Any) -> dict[str, Any]:
    """The fields of ModelConfig about sliding windows."""
    window = getattr(theirs, "sliding_window", None)
    full: list[int] = []
    if theirs.model_type in WINDOWED_BY_LAYER:
        full = [layer for layer, kind in enumerate(theirs.layer_types) if kind == FULL]
    if window is None or len(full) == theirs.num_hidden_layers:
        return {}
    return {"attention_window_tokens": window, "full_attention_layers": full}


def _head_size(theirs: Any) -> int:
    given = getattr(theirs, "head_dim", None)
    return given or theirs.hidden_size // theirs.num_attention_heads


def _expert_settings(theirs: Any) -> dict[str, Any]:
    """The fields of ModelConfig about experts."""
    if theirs.model_type == "mixtral":
        return {
            "experts": theirs.num_local_experts,
            "experts_per_token": theirs.num_experts_per_tok,
        }
    if theirs.model_type == "qwen3_moe":
        return {
            "experts": theirs.num_experts,
            "experts_per_token": theirs.num_experts_per_tok,
            "renormalize_experts": theirs.norm_topk_prob,
        }
    return {}
