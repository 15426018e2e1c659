"""Rotary embedding and its scaling, between config.json and our settings."""

from collections.abc import Iterator, Mapping
from typing import Any

from megatron_slm.config.architecture import ROPE_WITH_ATTENTION_FACTOR
from megatron_slm.config.schema import ModelConfig

ROPE_KEYS = ("rope_parameters", "rope_scaling", "rope_theta")
"""The keys of config.json about it; transformers 5 writes the first, transformers 4 the others."""
NUMBER_KEYS = ("rope_theta", "rotary_emb_base", "rotary_pct", "rope_local_base_freq")
"""Keys of config.json about it that are numbers, of all families; null is not set."""
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
    "dynamic": ("factor",),
    "longrope": ("short_factor", "long_factor", "original_max_position_embeddings"),
}
"""The kinds of rotary scaling that are implemented, with the numbers that each reads."""
_OPTIONS = {
    "yarn": ("beta_fast", "beta_slow", "attention_factor"),
    "longrope": ("factor", "attention_factor"),
}
_ROPE_ALWAYS = ("rope_type", "type", "rope_theta", "original_max_position_embeddings")
_NEVER_NULL = ("rope_type", "type", "rope_theta", "partial_rotary_factor")
_ABOVE_ZERO = _OPTIONS["yarn"]
_LISTS = ("short_factor", "long_factor")
_NUMBERS = frozenset(
    (
        "rope_theta",
        "partial_rotary_factor",
        "original_max_position_embeddings",
        *(name for names in ROPE_FIELDS.values() for name in names if name not in _LISTS),
        *_ABOVE_ZERO,
    )
)


def key_number_problems(config: Mapping[str, Any]) -> Iterator[str]:
    """Each of NUMBER_KEYS that is no number."""
    for key in NUMBER_KEYS:
        if config.get(key) is not None and not _is_number(config[key]):
            yield f"{key} {config[key]!r}; expected a number"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _value_problems(key: str, rope: Mapping[str, Any]) -> Iterator[str]:
    """Values of one rotary embedding that are null or no number where there must be one."""
    for name, value in rope.items():
        if value is None and name in _NEVER_NULL:
            yield f"{key} has {name} null; give it a value, or take it out"
        elif value is not None and name in _NUMBERS and not _is_number(value):
            yield f"{key} has {name} {value!r}; expected a number"
        elif value is not None and name in _ABOVE_ZERO and value <= 0:
            # transformers takes an attention_factor of 0 as it is, and a beta of 0 as its default.
            yield f"{key} has {name} {value!r}; expected above 0"


def rope_problems(config: Mapping[str, Any], *, partial: bool = False) -> Iterator[str]:
    """What config.json says twice, or what nothing here computes, of the rotary embedding.

    partial: the family may turn a part of each head.
    """
    if wrong := [*key_number_problems(config)]:
        yield from wrong
        return
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
    if wrong := [said for key, rope in given.items() for said in _value_problems(key, rope)]:
        yield from wrong
        return
    bases = {rope["rope_theta"] for rope in given.values() if "rope_theta" in rope}
    if config.get("rope_theta") is not None:
        bases.add(config["rope_theta"])
    if len(bases) > 1:
        yield f"rope_theta is given as {' and as '.join(map(str, sorted(bases)))}: keep one of them"
    for key, rope in given.items():
        yield from scaling_problems(key, rope, partial=partial)
        yield from _two_lengths(key, rope, config)


def scaling_problems(key: str, rope: Mapping[str, Any], *, partial: bool = False) -> Iterator[str]:
    """What nothing here computes of one rotary embedding, which config.json has under `key`."""
    if wrong := [*_value_problems(key, rope)]:
        yield from wrong
        return
    kinds = {rope[name] for name in ("rope_type", "type") if rope.get(name) is not None}
    kind = kinds.pop() if kinds else "default"
    if kinds or kind not in ROPE_FIELDS:
        yield (
            f"rotary scaling {kind!r} ({key} says {dict(rope)}); implemented are linear, llama3, "
            "yarn, dynamic and longrope"
        )
        return
    for name in ROPE_FIELDS[kind]:
        if name != "original_max_position_embeddings" and rope.get(name) is None:
            yield f"{key} of the kind {kind} lacks {name}"
    for name, value in rope.items():
        no_effect = (name, value) in (("partial_rotary_factor", 1.0), ("truncate", True))
        known_names = (*_ROPE_ALWAYS, *ROPE_FIELDS[kind], *_OPTIONS.get(kind, ()))
        known = name in known_names or no_effect
        known = known or (partial and name == "partial_rotary_factor")
        if value is not None and not known:
            yield f"{key} has {name} {value!r}, which the kind {kind} does not read here"


def _two_lengths(key: str, rope: Mapping[str, Any], config: Mapping[str, Any]) -> Iterator[str]:
    """The length that dynamic scaling begins at is max_position_embeddings in transformers 5."""
    name = "original_max_position_embeddings"
    length = rope.get(name)
    longest = config.get("max_position_embeddings")
    if "dynamic" in (rope.get("rope_type"), rope.get("type")) and length not in (None, longest):
        yield (
            f"{key} of the kind dynamic has {name} {length}, and max_position_embeddings is "
            f"{longest}: versions of transformers differ in which one they take; take {name} out"
        )


def rope_of(theirs: Any) -> dict[str, Any]:
    """rope_parameters of transformers' object, with what it takes from max_position_embeddings."""
    rope, longest = dict(theirs.rope_parameters), theirs.max_position_embeddings
    if rope["rope_type"] == "dynamic":
        rope["original_max_position_embeddings"] = longest
    if rope["rope_type"] == "longrope":
        factor = rope.get("factor") or longest / rope["original_max_position_embeddings"]
        rope["factor"] = max(1.0, factor)
    return rope


def rope_settings(rope: Mapping[str, Any]) -> dict[str, Any]:
    """The rope_* fields of ModelConfig for what rope_of gives, where rope_problems has passed."""
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
    if kind in ("yarn", "dynamic", "longrope"):
        original = int(rope["original_max_position_embeddings"])
        settings["rope_original_sequence_length"] = original
    if kind in ROPE_WITH_ATTENTION_FACTOR:
        settings["rope_attention_factor"] = float(rope.get("attention_factor") or 0)
    if kind == "yarn":
        settings |= {
            "rope_beta_fast": float(rope.get("beta_fast") or 32),
            "rope_beta_slow": float(rope.get("beta_slow") or 1),
        }
    if kind == "longrope":
        settings |= {
            "rope_short_factors": list(rope["short_factor"]),
            "rope_long_factors": list(rope["long_factor"]),
        }
    return settings


def rope_scaling(model: ModelConfig) -> dict | None:
    """config.json's rope_scaling of our settings."""
    if model.rope_scaling == "none":
        return None
    scaling: dict[str, Any] = {
        "rope_type": model.rope_scaling,
        "factor": model.rope_scaling_factor,
    }
    if model.rope_scaling == "llama3":
        scaling |= {
            "low_freq_factor": model.rope_low_frequency_factor,
            "high_freq_factor": model.rope_high_frequency_factor,
            "original_max_position_embeddings": model.rope_original_sequence_length,
        }
    if model.rope_scaling in ROPE_WITH_ATTENTION_FACTOR:
        scaling["original_max_position_embeddings"] = model.rope_original_sequence_length
        if model.rope_attention_factor:
            scaling["attention_factor"] = model.rope_attention_factor
    if model.rope_scaling == "yarn":
        scaling |= {"beta_fast": model.rope_beta_fast, "beta_slow": model.rope_beta_slow}
    if model.rope_scaling == "longrope":
        scaling |= {
            "short_factor": list(model.rope_short_factors),
            "long_factor": list(model.rope_long_factors),
        }
    return scaling


def longest_position(model: ModelConfig, sequence_length: int) -> int:
    """config.json's max_position_embeddings: the length that dynamic scaling begins at, otherwise
    the sequence length of the run.
    """
    dynamic = model.rope_scaling == "dynamic"
    return model.rope_original_sequence_length if dynamic else sequence_length
