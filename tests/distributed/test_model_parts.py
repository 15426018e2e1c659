"""Models of other parts than Llama's (LayerNorm, biases, GELU, no gate, partial rotary embedding,
learned positions, parallel residual; norms on outputs and over all heads, zero-centered norms, a
scaled embedding, a rotary base of windowed layers) train in every kind of layout as in plain torch.
"""

import dataclasses
import os

import pytest

from megatron_slm.config.check import check_config
from megatron_slm.config.schema import Config
from megatron_slm.testing.spawn import run_layouts_on_cpu, world_size
from tests.distributed.bench import LENGTH
from tests.distributed.test_layouts import (
    assert_equals_plain,
    assert_steps_equal_plain,
    make_config,
    plain_rows,
    train_in_layout,
)
from tests.known_models import GEMMA_3, GPT_2, NEOX, OLMO_3

STEPS = 3
# What one setting alone changes, and what two of them could do to each other.
MIXED = dict(
    normalization="layernorm",
    qk_norm=True,
    activation="relu",
    feed_forward_bias=True,
    attention_window_tokens=5,
    full_attention_layers=[1],
    parallel_residual=True,
)
WINDOWED = dict(attention_window_tokens=5, full_attention_layers=[1])
OWN = {
    "neox": NEOX | dict(query_groups=0),
    "gpt2": GPT_2 | dict(query_groups=0, learned_positions=LENGTH + 3),
    "olmo": OLMO_3 | WINDOWED | dict(rope_original_sequence_length=8),
    "gemma": GEMMA_3
    | WINDOWED
    | dict(head_size=12, attention_scale_size=20.0, embedding_scale=32**0.5, rope_base=1e6),
    "mixed": MIXED,
    "experts": dict(
        normalization="layernorm",
        qkv_bias=True,
        attention_output_bias=True,
        parallel_residual=True,
        experts=4,
        load_balancing_coefficient=0.0,
    ),
}
DENSE = ("neox", "gpt2", "mixed")
LAST_ROWS = ("neox_last_rows", "olmo_last_rows", "gemma_last_rows")
ISOLATED = ("neox_isolated", "gpt2_isolated", "gemma_isolated")
LAYOUTS = {
    "single": dict(cases=(*OWN, *LAST_ROWS, *ISOLATED)),
    "recompute_full": dict(recompute="full", cases=("neox",)),
    "recompute_selective": dict(recompute="selective", cases=("mixed",)),
    "tp2": dict(tp=2, cases=("neox", "gpt2", "olmo")),
    "tp2_sequence_parallel": dict(
        tp=2, sequence_parallel=True, cases=(*DENSE, *LAST_ROWS, "experts")
    ),
    "pp2": dict(pp=2, cases=("neox", "gpt2")),
    "cp2": dict(cp=2, cases=("mixed", "olmo", *ISOLATED)),
    "pp2_recompute_full": dict(pp=2, recompute="full", cases=("olmo", "gemma")),
    "tp2_pp2_recompute_full": dict(
        tp=2, pp=2, sequence_parallel=True, recompute="full", cases=("neox",)
    ),
}
if os.environ.get("SLM_ALL_LAYOUTS"):
    NORMS = ("olmo", "gemma")
    LAYOUTS |= {
        "tp2_gemma": dict(tp=2, cases=("gemma", "gemma_isolated")),
        "recompute_selective_norms": dict(recompute="selective", cases=NORMS),
        "dp2": dict(dp=2, distributed_optimizer=True, cases=NORMS),
        "tp2_cp2": dict(tp=2, cp=2, sequence_parallel=True, cases=(*NORMS, "gemma_isolated")),
        "tp2_pp2": dict(tp=2, pp=2, sequence_parallel=True, cases=NORMS),
    }


def configure(case: str, layout: dict) -> Config:
    """A case is one of OWN, perhaps with _isolated or _last_rows after it."""
    config = make_config("isolated" if case.endswith("isolated") else "data_parallel", layout)
    config.model = dataclasses.replace(config.model, **OWN[case.split("_")[0]])
    config.selection.backward_rows = "last_layer" if case.endswith("last_rows") else "all"
    config.schedule.train_steps = STEPS
    # A key's bias adds the same to all scores of a query, so that its gradient is nothing but
    # rounding where no rotation follows: AdamW must not make a step of it.
    config.optimizer.epsilon = 1e-5
    check_config(config, world_size(layout), training=False)
    return config


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(train_in_layout, LAYOUTS, LAYOUTS, configure, side_by_side=True)


@pytest.fixture(scope="module")
def plain(results):
    [ranks] = results["single"]
    return {case: plain_rows(case, ranks[case]["before"], configure) for case in ranks}


@pytest.mark.parametrize(
    "name, case", [(name, case) for name in LAYOUTS for case in LAYOUTS[name]["cases"]]
)
def test_layout_equals_plain_torch(name, case, results, plain):
    """At each step the same tokens, losses and gradient norm; after them the same weights, put
    together from all ranks.
    """
    if case == "experts":  # stored together, under another name than plain torch has
        assert_steps_equal_plain([rank[case] for rank in results[name]], case, plain[case][0])
    else:
        assert_equals_plain(results[name], case, plain[case])


def test_biases_start_at_zero_and_norms_at_one(results):
    [ranks] = results["single"]
    for case, found in ranks.items():
        for name, weight in found["before"].items():
            if name.endswith("bias"):
                assert not weight.any(), f"{case}: {name}"
            elif "layernorm" in name:
                zero_centered = case.startswith("gemma")
                assert (weight == (0 if zero_centered else 1)).all(), f"{case}: {name}"


@pytest.mark.parametrize("case", ["olmo", "gemma"])
def test_the_norms_stand_where_the_setting_says(case, results):
    """By the names of the first layer's weights."""
    [ranks] = results["single"]
    prefix = "decoder.layers.0."
    norms = {
        name.removeprefix(prefix): tuple(weight.shape)
        for name, weight in ranks[case]["before"].items()
        if name.startswith(prefix) and "layernorm" in name
    }
    outputs = {"post_self_attn_layernorm.weight": (32,), "post_mlp_layernorm.weight": (32,)}
    heads = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
    if case == "olmo":
        assert norms == outputs | {heads[0]: (32,), heads[1]: (16,)}
    else:
        inputs = {"input_layernorm.weight": (32,), "pre_mlp_layernorm.weight": (32,)}
        assert norms == outputs | inputs | dict.fromkeys(heads, (12,))
