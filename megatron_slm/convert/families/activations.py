"""Activations of feed-forward layers, between transformers' names and our settings."""

from collections.abc import Iterator

OURS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "silu": "silu",
    "swish": "silu",
}
"""transformers' names of what is computed here: four of one approximation in two ways of writing,
which differ in the last bits."""
THEIRS = {"gelu": "gelu", "gelu_tanh": "gelu_new", "relu": "relu", "silu": "silu"}


def activation_problems(key: str, name: str) -> Iterator[str]:
    """A phrase where config.json's activation, under this key, is none of these."""
    if name not in OURS:
        yield f"{key} {name!r}; expected one of {', '.join(OURS)}"
