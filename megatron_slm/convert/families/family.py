"""What one family of Hugging Face models is."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from megatron_slm.config.architecture import architecture, written
from megatron_slm.config.schema import ModelConfig
from megatron_slm.convert.families.rope import rope_problems
from megatron_slm.convert.table import Table

COMMON_KEYS = frozenset(
    (
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "hidden_act",
        "max_position_embeddings",
        "initializer_range",
        "tie_word_embeddings",
        "eos_token_id",
    )
)
"""Keys of config.json that most families have."""
SIZES = frozenset(
    (
        "layers",
        "hidden_size",
        "ffn_hidden_size",
        "attention_heads",
        "query_groups",
        "head_size",
        "vocabulary_size",
        "norm_epsilon",
        "tied_embeddings",
    )
)
"""Fields of ModelConfig that are free in every family, but for what its `lacks` says of them."""


def _nothing(_: Any) -> Iterator[str]:
    return iter(())


def _same(name: str) -> str:
    return name


@dataclass(frozen=True)
class Family:
    """One model_type of transformers: which of our models it is, and how it is written."""

    model_type: str
    architecture: str
    """The class of the causal language model."""
    keys: frozenset[str]
    """Keys of config.json that `settings` and `problems` use, or transformers' class for them."""
    table: Table
    """The names of its tensors."""
    free: frozenset[str]
    """Fields of ModelConfig that may have any value. One that is neither here nor in `fixed` has
    ModelConfig's default, so a field that is new is refused by every family that does not name it.
    """
    settings: Callable[[Any], dict[str, Any]]
    """The fields of ModelConfig, but for `fixed`, of the configuration object of transformers."""
    config: Callable[[ModelConfig, int], dict[str, Any]]
    """config.json of a model with this sequence length: what is the family's own."""
    fixed: Mapping[str, Any] = field(default_factory=dict)
    """Fields of ModelConfig with the value that they always have in this family."""
    file_problems: Callable[[Mapping[str, Any]], Iterator[str]] = rope_problems
    """What config.json itself says twice, or what nothing here computes, a phrase for each; asked
    before transformers reads it."""
    problems: Callable[[Any], Iterator[str]] = _nothing
    """What of the configuration object of transformers cannot be followed, a phrase for each."""
    lacks: Callable[[ModelConfig], Iterator[str]] = _nothing
    """What of a model cannot be written although each of its fields could be, a phrase for each."""
    derived: str = r".*\.rotary_emb\.inv_freq"
    """Names in `table`'s manner (a regular expression) of stored tensors that follow from the
    settings."""
    table_name: Callable[[str], str] = _same
    """What `table` calls a stored tensor, where files have other names for it too."""

    def obstacles(self, model: ModelConfig) -> Iterator[str]:
        """Why `model` is none of this family, a phrase for each reason; none if it is one."""
        defaults = ModelConfig()
        for name, value in architecture(model).items():
            if name in self.free:
                continue
            expected = self.fixed.get(name, getattr(defaults, name))
            if value != expected:
                yield (
                    f"model.{name} is {written(value)}, and always {written(expected)} in a "
                    f"{self.architecture}"
                )
        yield from self.lacks(model)
