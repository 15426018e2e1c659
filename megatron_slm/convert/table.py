"""The one table of tensor names and transforms, which is read in both directions.

Legend: V true vocabulary, Vp padded vocabulary, H hidden size, F feed-forward size, A query heads,
G query groups (key/value heads), D head size, E experts. All tensors are whole: tensor- and
pipeline-parallel pieces are put together before they come here.

Rotary embedding needs no transform: megatron-core's non-interleaved form and Hugging Face's
rotate_half pair the same channels.
"""

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from megatron_slm.convert.geometry import Geometry


@dataclass(frozen=True)
class Transform:
    """How one tensor of ours becomes Hugging Face's (`split`), and back (`join`); each undoes the
    other exactly.
    """

    split: Callable[[Tensor, Geometry], tuple[Tensor, ...]]
    join: Callable[[Sequence[Tensor], Geometry], Tensor]
    rows: Callable[[int, Geometry], tuple[int, ...]] = lambda rows, _: (rows,)
    """Rows of each of Hugging Face's tensors, of the rows of ours; the other sizes are equal."""


def _cut_padding(weight: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    if weight.shape[0] < geometry.vocabulary_size:
        raise ValueError(
            f"the embedding has {weight.shape[0]} rows, fewer than the vocabulary of "
            f"{geometry.vocabulary_size} tokens"
        )
    return (weight[: geometry.vocabulary_size],)


def _add_padding(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    """Padding rows are zeros: no label ever names them and their logits are excluded everywhere."""
    padding = geometry.padded_vocabulary_size - parts[0].shape[0]
    return torch.cat([parts[0], parts[0].new_zeros(padding, *parts[0].shape[1:])])


def _split_qkv(fused: Tensor, geometry: Geometry) -> tuple[Tensor, ...]:
    """[(A + 2G)·D, ...] grouped as (query heads of the group, its key head, its value head) per
    group → q [A·D], k [G·D], v [G·D].
    """
    queries = geometry.heads // geometry.groups
    grouped = fused.view(geometry.groups, queries + 2, geometry.head_size, *fused.shape[1:])
    return tuple(part.flatten(0, 2) for part in grouped.split([queries, 1, 1], dim=1))


def _join_qkv(parts: Sequence[Tensor], geometry: Geometry) -> Tensor:
    grouped = [
        part.view(geometry.groups, -1, geometry.head_size, *part.shape[1:]) for part in parts
    ]
    return torch.cat(grouped, dim=1).flatten(0, 2)


SAME = Transform(lambda tensor, _: (tensor,), lambda parts, _: parts[0])
VOCABULARY = Transform(_cut_padding, _add_padding, lambda _, g: (g.vocabulary_size,))
QKV = Transform(
    _split_qkv,
    _join_qkv,
    lambda _, g: (g.heads * g.head_size, g.groups * g.head_size, g.groups * g.head_size),
)
GATE_UP = Transform(
    lambda fused, _: tuple(fused.chunk(2)),
    lambda parts, _: torch.cat(list(parts)),
    lambda rows, _: (rows // 2, rows // 2),
)


@dataclass(frozen=True)
class Rule:
    """One line of the table; {layer} and {expert} in the names stand for every layer's and every
    expert's global number.
    """

    ours: str
    theirs: tuple[str, ...]
    transform: Transform
    shape: Callable[[Geometry], tuple[int, ...]]
    """Shape of our tensor."""
    present: Callable[[Geometry], bool] = lambda _: True
    """Whether a model of this kind has it."""


def _qkv_rows(geometry: Geometry) -> int:
    return (geometry.heads + 2 * geometry.groups) * geometry.head_size


_OURS = "decoder.layers.{layer}."
_THEIRS = "model.layers.{layer}."


def _dense(geometry: Geometry) -> bool:
    return not geometry.experts


def _mixtral(geometry: Geometry) -> bool:
    return geometry.experts > 0 and not geometry.qk_norm


def _qwen3_moe(geometry: Geometry) -> bool:
    return geometry.experts > 0 and geometry.qk_norm


def _expert_rules(
    present: Callable[[Geometry], bool],
    router: str,
    expert: str,
    gate_up: tuple[str, str],
    down: str,
) -> tuple[Rule, ...]:
    """A mixture of experts under the names of one family: the router, and each expert as a
    feed-forward layer of its own.
    """
    own, theirs = _OURS + "mlp.experts.local_experts.{expert}.", _THEIRS + expert
    return (
        Rule(
            _OURS + "mlp.router.weight",
            (_THEIRS + router,),
            SAME,
            lambda g: (g.experts, g.hidden_size),
            present,
        ),
        Rule(
            own + "linear_fc1.weight",
            tuple(theirs + name for name in gate_up),
            GATE_UP,
            lambda g: (2 * g.ffn_hidden_size, g.hidden_size),
            present,
        ),
        Rule(
            own + "linear_fc2.weight",
            (theirs + down,),
            SAME,
            lambda g: (g.hidden_size, g.ffn_hidden_size),
            present,
        ),
    )


def _attention(suffix: str, parts: str = "qkv") -> tuple[str, ...]:
    return tuple(f"{_THEIRS}self_attn.{part}_{suffix}" for part in parts)


TABLE: tuple[Rule, ...] = (
    Rule(
        "embedding.word_embeddings.weight",
        ("model.embed_tokens.weight",),
        VOCABULARY,
        lambda g: (g.padded_vocabulary_size, g.hidden_size),
    ),
    Rule(
        _OURS + "input_layernorm.weight",
        (_THEIRS + "input_layernorm.weight",),
        SAME,
        lambda g: (g.hidden_size,),
    ),
    Rule(
        _OURS + "self_attention.linear_qkv.weight",
        _attention("proj.weight"),
        QKV,
        lambda g: (_qkv_rows(g), g.hidden_size),
    ),
    Rule(
        _OURS + "self_attention.linear_qkv.bias",
        _attention("proj.bias"),
        QKV,
        lambda g: (_qkv_rows(g),),
        lambda g: g.qkv_bias,
    ),
    Rule(
        _OURS + "self_attention.q_layernorm.weight",
        _attention("norm.weight", "q"),
        SAME,
        lambda g: (g.head_size,),
        lambda g: g.qk_norm,
    ),
    Rule(
        _OURS + "self_attention.k_layernorm.weight",
        _attention("norm.weight", "k"),
        SAME,
        lambda g: (g.head_size,),
        lambda g: g.qk_norm,
    ),
    Rule(
        _OURS + "self_attention.linear_proj.weight",
        _attention("proj.weight", "o"),
        SAME,
        lambda g: (g.hidden_size, g.heads * g.head_size),
    ),
    Rule(
        _OURS + "pre_mlp_layernorm.weight",
        (_THEIRS + "post_attention_layernorm.weight",),
        SAME,
        lambda g: (g.hidden_size,),
    ),
    Rule(
        _OURS + "mlp.linear_fc1.weight",
        (_THEIRS + "mlp.gate_proj.weight", _THEIRS + "mlp.up_proj.weight"),
        GATE_UP,
        lambda g: (2 * g.ffn_hidden_size, g.hidden_size),
        _dense,
    ),
    Rule(
        _OURS + "mlp.linear_fc2.weight",
        (_THEIRS + "mlp.down_proj.weight",),
        SAME,
        lambda g: (g.hidden_size, g.ffn_hidden_size),
        _dense,
    ),
    *_expert_rules(
        _mixtral,
        "block_sparse_moe.gate.weight",
        "block_sparse_moe.experts.{expert}.",
        ("w1.weight", "w3.weight"),
        "w2.weight",
    ),
    *_expert_rules(
        _qwen3_moe,
        "mlp.gate.weight",
        "mlp.experts.{expert}.",
        ("gate_proj.weight", "up_proj.weight"),
        "down_proj.weight",
    ),
    Rule(
        "decoder.final_layernorm.weight", ("model.norm.weight",), SAME, lambda g: (g.hidden_size,)
    ),
    Rule(
        "output_layer.weight",
        ("lm_head.weight",),
        VOCABULARY,
        lambda g: (g.padded_vocabulary_size, g.hidden_size),
        lambda g: not g.tied,
    ),
)


@dataclass(frozen=True)
class Entry:
    """One tensor of one model: a rule with its layer and expert numbers filled in."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform
    shape: tuple[int, ...]
    """Shape of our tensor."""
    their_shapes: tuple[tuple[int, ...], ...]
    """Shape of each of theirs."""


def entries(geometry: Geometry) -> list[Entry]:
    """Every tensor of a model, in the order of the network: embedding, layers, head."""
    rules = [rule for rule in TABLE if rule.present(geometry)]
    found: list[Entry] = []
    for of_layers, group in itertools.groupby(rules, key=lambda rule: "{layer}" in rule.ours):
        group_rules = list(group)
        for layer in range(geometry.layers if of_layers else 1):
            for rule in group_rules:
                found += _entries_of(rule, layer, geometry)
    return found


def _entries_of(rule: Rule, layer: int, geometry: Geometry) -> Iterator[Entry]:
    """The rule for one layer: one entry, or one for each expert."""
    for expert in range(geometry.experts if "{expert}" in rule.ours else 1):
        theirs = tuple(name.format(layer=layer, expert=expert) for name in rule.theirs)
        ours = rule.ours.format(layer=layer, expert=expert)
        rows, *others = rule.shape(geometry)
        their_shapes = tuple((own, *others) for own in rule.transform.rows(rows, geometry))
        yield Entry(ours, theirs, rule.transform, (rows, *others), their_shapes)
