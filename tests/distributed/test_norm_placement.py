"""Models with the norms, scales and rotary embeddings of OLMo 3 and of Gemma 3 in several layouts,
against plain single-process torch: losses, choices, gradient norm, and every weight after the last
step.
"""

import dataclasses
import os

import pytest

from megatron_slm.config.check import check_config
from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.plain_trainer import PlainTrainer
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu
from tests.distributed.bench import (
    LENGTH,
    VOCABULARY,
    SyntheticSamples,
    local_steps,
    make_trainer,
    rows_in_populations,
    train,
    weights_of,
    whole_batch,
)
from tests.distributed.test_layouts import assert_equals_plain, weight_shards

STEPS = 3
SEQUENCES = 4
RATE = 1e-2
OLMO = dict(
    norm_placement="after",
    qk_norm=True,
    qk_norm_over="all_heads",
    rope_base_windowed=10000.0,
    rope_scaling="yarn",
    rope_scaling_factor=4.0,
    rope_original_sequence_length=8,
)
GEMMA = dict(
    norm_placement="both",
    zero_centered_norms=True,
    qk_norm=True,
    head_size=12,
    attention_scale_size=20.0,
    embedding_scale=32**0.5,
    tied_embeddings=True,
    rope_base=1e6,
    rope_base_windowed=100.0,
    rope_scaling="linear",
)
CASES = {"olmo": OLMO, "gemma": GEMMA, "gemma_isolated": GEMMA}
BOTH = ("olmo", "gemma")
LAYOUTS = {
    "single": dict(cases=tuple(CASES)),
    "tp2": dict(tp=2, cases=("olmo",)),
    "tp2_sequence_parallel": dict(
        tp=2, sequence_parallel=True, backward_rows="last_layer", cases=BOTH
    ),
    "pp2_recompute_full": dict(pp=2, recompute="full", cases=BOTH),
    "cp2": dict(cp=2, cases=("olmo", "gemma_isolated")),
}
if os.environ.get("SLM_ALL_LAYOUTS"):
    LAYOUTS |= {
        "tp2_gemma": dict(tp=2, cases=("gemma", "gemma_isolated")),
        "recompute_selective": dict(recompute="selective", cases=BOTH),
        "dp2": dict(dp=2, distributed_optimizer=True, cases=BOTH),
        "tp2_cp2": dict(tp=2, cp=2, sequence_parallel=True, cases=tuple(CASES)),
        "tp2_pp2": dict(tp=2, pp=2, sequence_parallel=True, cases=BOTH),
    }


def make_config(case: str, layout: dict) -> Config:
    config = Config()
    config.model = dataclasses.replace(
        config.model,
        layers=2,
        hidden_size=32,
        ffn_hidden_size=48,
        attention_heads=4,
        query_groups=2,
        pad_vocabulary_to_multiple_of=64,
        initialization_std=0.1,
        attention_window_tokens=5,
        full_attention_layers=[1],
        recompute=layout.get("recompute", "none"),
        **CASES[case],
    )
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=SEQUENCES,
        micro_batch_size=2 // layout.get("dp", 1),
        document_policy="isolated" if case.endswith("isolated") else "packed",
        train=["corpus"],
        tokenizer="t",
    )
    config.selection = dataclasses.replace(
        config.selection,
        scorer="excess_loss",
        keep_fraction=0.6,
        backward_rows=layout.get("backward_rows", "all"),
    )
    config.selection.reference.scores = ["synthetic"]
    config.parallel = dataclasses.replace(
        parallel_config(layout), distributed_optimizer=layout.get("distributed_optimizer", False)
    )
    config.schedule.train_steps = STEPS
    return config


def train_in_layout(groups, name):
    from megatron.core.utils import unwrap_model

    from megatron_slm.parallel import seed_everything

    layout = LAYOUTS[name]
    results = {}
    for case in layout["cases"]:
        config = make_config(case, layout)
        check_config(config, groups.world_size)
        seed_everything(config.run.seed, groups)
        trainer = make_trainer(groups, config)
        before = weights_of(trainer)
        samples = SyntheticSamples(STEPS * SEQUENCES, case.endswith("isolated"))
        batches = local_steps(groups, config, samples, STEPS)
        results[case] = {
            "before": before,
            "steps": list(train(trainer, config, batches, rate=RATE)),
            "shards": weight_shards(unwrap_model(trainer.models)),
            "last_stage": groups.is_last_stage,
            "tp_rank": groups.tp_rank,
        }
    return results


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(train_in_layout, LAYOUTS, side_by_side=True)


@pytest.fixture(scope="module")
def plain(results):
    return {case: plain_rows(case, results["single"][0][case]["before"]) for case in CASES}


def plain_rows(case, state):
    config = make_config(case, {})
    trainer = PlainTrainer(PlainDecoder(config.model, VOCABULARY, state), config.optimizer)
    samples = SyntheticSamples(STEPS * SEQUENCES, case.endswith("isolated"))
    rows = [
        trainer.step(
            whole_batch(samples, range(step * SEQUENCES, (step + 1) * SEQUENCES)),
            rows_in_populations("data_parallel", SEQUENCES, 2),
            config.selection.keep_fraction,
            RATE,
        )
        for step in range(STEPS)
    ]
    return rows, {name: trainer.decoder.weight(name).detach() for name in trainer.decoder.names}


@pytest.mark.parametrize(
    "name, case", [(name, case) for name in LAYOUTS for case in LAYOUTS[name]["cases"]]
)
def test_layout_equals_plain_torch(name, case, results, plain):
    assert_equals_plain(results[name], case, plain[case])


@pytest.mark.parametrize("case", ["olmo", "gemma"])
def test_the_norms_stand_where_the_setting_says(case, results):
    """By the names of the first layer's weights; those of zero-centered norms begin at 0."""
    weights = results["single"][0][case]["before"]
    prefix = "decoder.layers.0."
    norms = {
        name.removeprefix(prefix): tuple(weight.shape)
        for name, weight in weights.items()
        if name.startswith(prefix) and "layernorm" in name
    }
    outputs = {"post_self_attn_layernorm.weight": (32,), "post_mlp_layernorm.weight": (32,)}
    heads = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
    if case == "olmo":
        assert norms == outputs | {heads[0]: (32,), heads[1]: (16,)}
    else:
        inputs = {"input_layernorm.weight": (32,), "pre_mlp_layernorm.weight": (32,)}
        assert norms == outputs | inputs | dict.fromkeys(heads, (12,))
    for name, weight in weights.items():
        if "layernorm" in name:
            assert set(weight.tolist()) == {0.0 if case == "gemma" else 1.0}, name
