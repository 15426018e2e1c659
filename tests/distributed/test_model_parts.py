"""Models of other parts than Llama's (LayerNorm, biases, GELU, no gate, partial rotary embedding,
learned positions, parallel residual) train in every kind of layout as in plain torch.
"""

import dataclasses

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

STEPS = 3
NEOX = dict(
    normalization="layernorm",
    activation="gelu",
    gated_feed_forward=False,
    qkv_bias=True,
    attention_output_bias=True,
    feed_forward_bias=True,
    query_groups=0,
    rope_fraction=0.5,
    parallel_residual=True,
)
GPT_2 = NEOX | dict(
    activation="gelu_tanh",
    rope_fraction=1.0,
    parallel_residual=False,
    position_embedding="learned",
    learned_positions=LENGTH + 3,
    tied_embeddings=True,
)
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
MODELS = {
    "neox": NEOX,
    "neox_isolated": NEOX,
    "neox_last_rows": NEOX,
    "gpt2": GPT_2,
    "gpt2_isolated": GPT_2,
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
LAYOUTS = {
    "single": dict(cases=(*DENSE, "neox_isolated", "gpt2_isolated", "neox_last_rows", "experts")),
    "recompute_full": dict(recompute="full", cases=("neox",)),
    "recompute_selective": dict(recompute="selective", cases=("mixed",)),
    "tp2": dict(tp=2, cases=("neox", "gpt2")),
    "tp2_sequence_parallel": dict(
        tp=2, sequence_parallel=True, cases=(*DENSE, "neox_last_rows", "experts")
    ),
    "pp2": dict(pp=2, cases=("neox", "gpt2")),
    "cp2": dict(cp=2, cases=("mixed", "neox_isolated", "gpt2_isolated")),
    "tp2_pp2_recompute_full": dict(
        tp=2, pp=2, sequence_parallel=True, recompute="full", cases=("neox",)
    ),
}


def configure(case: str, layout: dict) -> Config:
    config = make_config("isolated" if case.endswith("isolated") else "data_parallel", layout)
    config.model = dataclasses.replace(config.model, **MODELS[case])
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
                assert (weight == 1).all(), f"{case}: {name}"
