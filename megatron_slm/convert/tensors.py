"""The tensors of our model: their names, their shapes and which model has them. No torch.

Legend: V true vocabulary, Vp padded vocabulary, H hidden size, F feed-forward size, A query heads,
G query groups (key/value heads), D head size, E experts. All tensors are whole: tensor- and
pipeline-parallel pieces are put together before they come here. Families say under which names
Hugging Face has them (families/).
"""

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from megatron_slm.convert.geometry import Geometry

LAYER = "decoder.layers.{layer}."
EXPERT = LAYER + "mlp.experts.local_experts.{expert}."


@dataclass(frozen=True)
class Kind:
    """A tensor that a model has once, once in each layer, or once for each expert of each layer."""

    name: str
    """{layer} and {expert} in it stand for every layer's and every expert's global number."""
    shape: Callable[[Geometry], tuple[int, ...]]
    present: Callable[[Geometry], bool] = lambda _: True
    """Whether a model has it."""


def _qkv_rows(geometry: Geometry) -> int:
    return (geometry.heads + 2 * geometry.groups) * geometry.head_size


def _up_rows(geometry: Geometry) -> int:
    """Of the first product of a feed-forward layer: gate and up, or up alone."""
    return (2 if geometry.gated else 1) * geometry.ffn_hidden_size


def _dense(geometry: Geometry) -> bool:
    return not geometry.experts


def _hidden(geometry: Geometry) -> int:
    return geometry.hidden_size


def _query_norm(geometry: Geometry) -> int:
    return geometry.head_size * (geometry.heads if geometry.norm_over_all_heads else 1)


def _key_norm(geometry: Geometry) -> int:
    return geometry.head_size * (geometry.groups if geometry.norm_over_all_heads else 1)


def _norm(
    place: str,
    size: Callable[[Geometry], int],
    present: Callable[[Geometry], bool] = lambda _: True,
) -> tuple[Kind, Kind]:
    """The weight and the bias of a norm."""
    return (
        Kind(place + ".weight", lambda g: (size(g),), present),
        Kind(place + ".bias", lambda g: (size(g),), lambda g: present(g) and g.norm_bias),
    )


def _mixture(geometry: Geometry) -> bool:
    return geometry.experts > 0


KINDS: tuple[Kind, ...] = (
    Kind(
        "embedding.word_embeddings.weight",
        lambda g: (g.padded_vocabulary_size, g.hidden_size),
    ),
    Kind(
        "embedding.position_embeddings.weight",
        lambda g: (g.positions, g.hidden_size),
        lambda g: g.positions > 0,
    ),
    *_norm(LAYER + "input_layernorm", _hidden, lambda g: g.norms_before),
    Kind(LAYER + "self_attention.linear_qkv.weight", lambda g: (_qkv_rows(g), g.hidden_size)),
    Kind(
        LAYER + "self_attention.linear_qkv.bias",
        lambda g: (_qkv_rows(g),),
        lambda g: g.qkv_bias,
    ),
    *_norm(LAYER + "self_attention.q_layernorm", _query_norm, lambda g: g.qk_norm),
    *_norm(LAYER + "self_attention.k_layernorm", _key_norm, lambda g: g.qk_norm),
    Kind(
        LAYER + "self_attention.linear_proj.weight",
        lambda g: (g.hidden_size, g.heads * g.head_size),
    ),
    Kind(
        LAYER + "self_attention.linear_proj.bias",
        lambda g: (g.hidden_size,),
        lambda g: g.attention_output_bias,
    ),
    *_norm(LAYER + "post_self_attn_layernorm", _hidden, lambda g: g.norms_after),
    *_norm(LAYER + "pre_mlp_layernorm", _hidden, lambda g: g.norms_before),
    Kind(LAYER + "mlp.linear_fc1.weight", lambda g: (_up_rows(g), g.hidden_size), _dense),
    Kind(
        LAYER + "mlp.linear_fc1.bias",
        lambda g: (_up_rows(g),),
        lambda g: g.feed_forward_bias,
    ),
    Kind(LAYER + "mlp.linear_fc2.weight", lambda g: (g.hidden_size, g.ffn_hidden_size), _dense),
    Kind(
        LAYER + "mlp.linear_fc2.bias",
        lambda g: (g.hidden_size,),
        lambda g: g.feed_forward_bias,
    ),
    Kind(LAYER + "mlp.router.weight", lambda g: (g.experts, g.hidden_size), _mixture),
    Kind(
        EXPERT + "linear_fc1.weight",
        lambda g: (2 * g.ffn_hidden_size, g.hidden_size),
        _mixture,
    ),
    Kind(EXPERT + "linear_fc2.weight", lambda g: (g.hidden_size, g.ffn_hidden_size), _mixture),
    *_norm(LAYER + "post_mlp_layernorm", _hidden, lambda g: g.norms_after),
    *_norm("decoder.final_layernorm", _hidden),
    Kind(
        "output_layer.weight",
        lambda g: (g.padded_vocabulary_size, g.hidden_size),
        lambda g: not g.tied,
    ),
)
"""In the order of the network: embedding, layers, head."""


@dataclass(frozen=True)
class OurTensor:
    """One tensor of one model: a kind with its layer and expert numbers filled in."""

    kind: str
    """The name of its kind."""
    layer: int
    expert: int
    shape: tuple[int, ...]

    @property
    def name(self) -> str:
        """Its name in a checkpoint."""
        return self.kind.format(layer=self.layer, expert=self.expert)


def our_tensors(geometry: Geometry) -> Iterator[OurTensor]:
    """Every tensor of a model, in the order of the network, layer by layer."""
    kinds = [kind for kind in KINDS if kind.present(geometry)]
    for of_layers, group in itertools.groupby(kinds, key=lambda kind: "{layer}" in kind.name):
        group_kinds = list(group)
        for layer, kind in itertools.product(
            range(geometry.layers if of_layers else 1), group_kinds
        ):
            for expert in range(geometry.experts if "{expert}" in kind.name else 1):
                yield OurTensor(kind.name, layer, expert, kind.shape(geometry))
