"""A number that changes over training: the keep fraction, or the share of plain CLM in the loss.

Time is counted in processed tokens.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass

from megatron_slm.selection.naming import meant

STYLES = ("constant", "linear", "cosine", "warmup")


@dataclass(frozen=True)
class TrainingProgress:
    """Where training stands: the optimizer step (0 before the first) and the tokens before it."""

    step: int = 0
    tokens: int = 0


@dataclass(frozen=True)
class Schedule:
    """value(tokens): `start` for hold_tokens, then to `end` over ramp_tokens along `style`, then
    `end`. Called with processed tokens.
    """

    style: str
    start: float
    end: float
    ramp_tokens: int = 0
    hold_tokens: int = 0

    def __call__(self, tokens: int) -> float:
        passed = tokens - self.hold_tokens
        if passed < 0:
            return self.start
        if passed >= self.ramp_tokens:
            return self.end
        passed_fraction = passed / self.ramp_tokens
        if self.style == "cosine":
            passed_fraction = 0.5 - 0.5 * math.cos(math.pi * passed_fraction)
        return self.start + (self.end - self.start) * passed_fraction


# style -> (keys that must be given, keys that may be given)
_KEYS = {
    "constant": ({"value"}, set()),
    "linear": ({"start", "end", "tokens"}, {"hold_tokens"}),
    "cosine": ({"start", "end", "tokens"}, {"hold_tokens"}),
    "warmup": ({"end"}, {"tokens", "hold_tokens"}),
}


def build_schedule(
    setting: float | Mapping | Schedule, name: str = "keep_fraction", *, allow_zero: bool = False
) -> Schedule:
    """A Schedule from a number or a mapping, as a configuration file gives it.

        0.6
        {style: constant, value: 0.6}
        {style: linear, start: 1.0, end: 0.6, tokens: 1_000_000}
            also cosine; with hold_tokens it stays at start first
        {style: warmup, end: 0.6, hold_tokens: 500_000, tokens: 500_000}
            plain CLM (1.0) held, then a straight line to end

    Values must be above 0 (at least 0 with allow_zero) and at most 1. Raises ValueError, naming
    `name`, for anything else.
    """
    if isinstance(setting, Schedule):
        return setting
    if isinstance(setting, Mapping):
        return _from_mapping(setting, name, allow_zero)
    value = _fraction(setting, name, allow_zero)
    return Schedule("constant", value, value)


def _from_mapping(setting: Mapping, name: str, allow_zero: bool) -> Schedule:
    style = setting.get("style")
    if style not in STYLES:
        raise ValueError(
            f"{name}.style must be one of {', '.join(STYLES)}, got {style!r}{meant(style, STYLES)}"
        )
    given = {key for key, value in setting.items() if key != "style" and value is not None}
    required, optional = _KEYS[style]
    if given - required - optional:
        raise ValueError(
            f"{name}: style {style} does not take {_listed(given - required - optional)}; "
            f"it takes {_listed(required | optional)}"
        )
    if required - given:
        raise ValueError(f"{name}: style {style} also needs {_listed(required - given)}")
    if style == "constant":
        return build_schedule(setting["value"], f"{name}.value", allow_zero=allow_zero)
    start = 1.0 if style == "warmup" else _fraction(setting["start"], f"{name}.start", allow_zero)
    end = _fraction(setting["end"], f"{name}.end", allow_zero)
    ramp_tokens = _token_count(setting.get("tokens") or 0, f"{name}.tokens")
    hold_tokens = _token_count(setting.get("hold_tokens") or 0, f"{name}.hold_tokens")
    if ramp_tokens + hold_tokens == 0:
        raise ValueError(
            f"{name}: style {style} must last some time, but its tokens add to 0; for one value "
            f"write {name}: {end}"
        )
    return Schedule(style, start, end, ramp_tokens, hold_tokens)


def check_keep_fraction(keep_fraction: float) -> float:
    """The keep fraction as a Python float. Raises ValueError unless 0 < keep_fraction <= 1."""
    value = float(keep_fraction)
    if not 0.0 < value <= 1.0:
        raise ValueError(
            f"keep_fraction must be above 0 and at most 1, got {keep_fraction!r}; 1.0 keeps every "
            "eligible token (plain CLM)"
        )
    return value


def _fraction(value: object, name: str, allow_zero: bool) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"{name} must be a number or a mapping with a style, got {value!r}")
    if not (0.0 <= value <= 1.0 if allow_zero else 0.0 < value <= 1.0):
        raise ValueError(
            f"{name} must be {'at least' if allow_zero else 'above'} 0 and at most 1, got {value!r}"
        )
    return float(value)


def _token_count(value: object, name: str) -> int:
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or not 0 <= value < math.inf
        or value != int(value)
    ):
        raise ValueError(f"{name} must be a whole number of tokens, at least 0, got {value!r}")
    return int(value)


def _listed(keys: set[str]) -> str:
    return ", ".join(sorted(keys))
