"""One table: the same model, data and ten optimizer steps in every parallel layout, against plain
single-process torch.
"""

import dataclasses
import os

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder
from megatron_slm.testing.plain_trainer import PlainTrainer
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu, run_on_cpu
from tests.distributed.bench import (
    LENGTH,
    VOCABULARY,
    SyntheticSamples,
    assert_same_step,
    local_steps,
    make_trainer,
    rows_in_populations,
    train,
    weights_of,
    whole_batch,
)

STEPS = 10
SEQUENCES = 8
POPULATION = 4
"""Sequences that compete at once under scope data_parallel, dp * micro-batch size in each layout.
"""
KEEP = 0.6

EVERY_CASE = ("clm", "data_parallel", "sequence", "global_batch", "keep_all")
FEW = ("data_parallel",)
ISOLATED = ("data_parallel", "isolated")
WINDOWED = ("windowed", "windowed_isolated")
"""Sliding windows of 5 of the 16 tokens in all layers but the second, and no rotary embedding in
the third; several documents too."""
LAYOUTS = {
    "single": dict(cases=(*EVERY_CASE, "isolated", *WINDOWED)),
    "recompute_selective": dict(recompute="selective", cases=(*ISOLATED, "windowed")),
    "recompute_full": dict(recompute="full", cases=ISOLATED),
    "bf16": dict(precision="bf16", cases=FEW),
    "fp16": dict(precision="fp16", cases=FEW),
    "dp2": dict(dp=2, cases=(*EVERY_CASE, "isolated")),
    "tp2": dict(tp=2, cases=EVERY_CASE),
    "pp2": dict(pp=2, cases=(*EVERY_CASE, "isolated")),
    "tp2_sequence_parallel": dict(tp=2, sequence_parallel=True, cases=(*EVERY_CASE, "isolated")),
    "pp2_virtual2": dict(pp=2, vpp=2, cases=(*EVERY_CASE, "isolated", "windowed")),
    "dp2_distributed_optimizer": dict(dp=2, distributed_optimizer=True, cases=EVERY_CASE),
    "dp2_overlap": dict(dp=2, distributed_optimizer=True, overlap=True, cases=EVERY_CASE),
    "dp2_bf16_distributed_optimizer": dict(
        dp=2, distributed_optimizer=True, precision="bf16", cases=FEW
    ),
    "dp2_fp16_distributed_optimizer": dict(
        dp=2, distributed_optimizer=True, precision="fp16", cases=FEW
    ),
    "cp2": dict(cp=2, cases=(*EVERY_CASE, "isolated", *WINDOWED)),
    "tp2_pp2": dict(tp=2, pp=2, cases=EVERY_CASE),
    "tp2_dp2": dict(tp=2, dp=2, cases=EVERY_CASE),
    "tp2_pp2_sequence_parallel": dict(tp=2, pp=2, sequence_parallel=True, cases=EVERY_CASE),
    "dp4": dict(dp=4, cases=("data_parallel", "global_batch")),
    "tp4_sequence_parallel": dict(tp=4, sequence_parallel=True, cases=FEW),
    "pp4": dict(pp=4, cases=FEW),
    "cp4": dict(cp=4, cases=ISOLATED),
    "tp2_cp2": dict(tp=2, cp=2, cases=FEW),
    "pp2_cp2": dict(pp=2, cp=2, cases=ISOLATED),
    "pp2_virtual2_dp2": dict(
        pp=2, vpp=2, dp=2, distributed_optimizer=True, overlap=True, cases=FEW
    ),
    "tp2_pp2_recompute_full": dict(tp=2, pp=2, sequence_parallel=True, recompute="full", cases=FEW),
    "tp2_pp2_dp2": dict(tp=2, pp=2, dp=2, cases=FEW),
    "tp2_cp2_dp2": dict(
        tp=2,
        cp=2,
        dp=2,
        sequence_parallel=True,
        distributed_optimizer=True,
        overlap=True,
        cases=("isolated",),
    ),
}
"""name -> parallel sizes and options; the micro-batch size follows from POPULATION. Each takes
another path through megatron-core.
"""
if os.environ.get("SLM_LAYOUTS") == "short":  # as tests/run.sh --core asks for
    names = "single recompute_selective recompute_full tp2 tp2_pp2 tp2_dp2 pp2_virtual2_dp2"
    names += " tp2_cp2_dp2 dp2_bf16_distributed_optimizer dp2_fp16_distributed_optimizer"
    for name, layout in LAYOUTS.items():
        tried = ISOLATED if name in names.split() else ()
        layout["cases"] = [case for case in layout["cases"] if case in tried]
TRIED = {name: layout for name, layout in LAYOUTS.items() if layout["cases"]}
ROUNDED = [name for name, layout in TRIED.items() if "precision" in layout]
EXACT = [name for name in TRIED if name not in ROUNDED]


def make_config(case: str, layout: dict) -> Config:
    config = Config()
    config.model = dataclasses.replace(
        config.model,
        layers=4,
        hidden_size=32,
        ffn_hidden_size=48,
        attention_heads=8,
        query_groups=4,
        pad_vocabulary_to_multiple_of=64,
        initialization_std=0.1,
        tied_embeddings=case == "sequence",
        recompute=layout.get("recompute", "none"),
        attention_window_tokens=5 if case in WINDOWED else 0,
        full_attention_layers=[1] if case in WINDOWED else [],
        layers_without_rope=[2] if case in WINDOWED else [],
    )
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=SEQUENCES,
        micro_batch_size=POPULATION // layout.get("dp", 1),
        document_policy="isolated" if case.endswith("isolated") else "packed",
    )
    config.device.precision = layout.get("precision", "fp32")
    config.device.layers = "torch"
    config.selection.keep_fraction = 1.0 if case == "keep_all" else KEEP
    config.selection.scorer = "none" if case == "clm" else "excess_loss"
    config.selection.scope = (
        case if case in ("data_parallel", "sequence", "global_batch") else "data_parallel"
    )
    config.selection.reference.scores = ["synthetic"]
    overlap = layout.get("overlap", False)
    config.parallel = dataclasses.replace(
        parallel_config(layout),
        distributed_optimizer=layout.get("distributed_optimizer", False),
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    config.schedule.train_steps = STEPS
    config.optimizer.learning_rate = 3e-3
    return config


def train_in_layout(groups, name, layouts=LAYOUTS, configure=make_config):
    """Of each case the real steps of a run in this layout: the weights at the start (this rank's,
    by local name) and at the end (this rank's shards, by global name and place), and how often
    parts of the model ran.

    configure: makes the configuration of a case and a layout.
    """
    from megatron.core.utils import unwrap_model

    from megatron_slm.parallel import seed_everything

    layout = layouts[name]
    results = {}
    for case in layout["cases"]:
        config = configure(case, layout)
        count = config.schedule.train_steps
        seed_everything(config.run.seed, groups)
        trainer = make_trainer(groups, config)
        chunks = unwrap_model(trainer.models)
        before = weights_of(trainer)
        calls = count_calls(chunks)
        samples = SyntheticSamples(count * SEQUENCES, case.endswith("isolated"))
        steps = list(train(trainer, config, local_steps(groups, config, samples, count)))
        if config.parallel.overlap_param_gather:  # the last update's gather is still under way
            for model in trainer.models:
                model.disable_forward_pre_hook()
        results[case] = {
            "steps": steps,
            "before": before,
            "shards": weight_shards(chunks),
            "last_stage": groups.is_last_stage,
            "tp_rank": groups.tp_rank,
            "calls": calls,
            "gradient_dtypes": {p.main_grad.dtype for chunk in chunks for p in chunk.parameters()},
        }
    return results


def count_calls(chunks):
    """Running counts of the forward calls of attention cores and MLPs of this rank."""
    calls = {"core_attention": 0, "mlp": 0}
    for chunk in chunks:
        for name, module in chunk.named_modules():
            if (part := name.rsplit(".")[-1]) in calls:
                module.register_forward_pre_hook(
                    lambda *_, part=part: calls.update({part: calls[part] + 1})
                )
    return calls


def weight_shards(chunks):
    """(global name, global shape, place in it, values) of every part of a weight of this rank."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = {number: chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    apply_factories(sharded)
    shards = []
    for tensor in nested_values(sharded):
        if not isinstance(tensor, ShardedTensor):
            continue
        stacked = tensor.prepend_axis_num
        ends = zip(tensor.global_offset[stacked:], tensor.local_shape, strict=True)
        inside = [slice(offset, offset + length) for offset, length in ends]
        place = (*tensor.global_offset[:stacked], *inside)
        shards.append(
            (tensor.key, tensor.global_shape, place, tensor.data.detach().float().clone())
        )
    return shards


def whole_weights(ranks):
    """The full weights of a layout under megatron-core's names in one process, from the shards of
    all its ranks; NaN where no rank holds any.
    """
    stacked = {}
    for rank in ranks:
        for key, shape, place, values in rank["shards"]:
            full = stacked.setdefault(key, torch.full(shape, float("nan")))
            known = full[place].isfinite()
            assert torch.equal(full[place][known], values[known]), (
                f"{key}: ranks that share this weight disagree"
            )
            full[place] = values
    weights = {}
    for key, full in stacked.items():
        if key.startswith("decoder.layers."):
            # Stored under the names of Transformer Engine's fused layers, so that its checkpoints
            # and ours are one.
            rest = key.removeprefix("decoder.layers.").replace(
                "self_attention.linear_qkv.layer_norm_", "input_layernorm."
            )
            rest = rest.replace("mlp.linear_fc1.layer_norm_", "pre_mlp_layernorm.")
            weights |= {f"decoder.layers.{layer}.{rest}": part for layer, part in enumerate(full)}
        else:
            weights[key] = full
    return weights


def plain_rows(case, state, configure=make_config):
    """The same steps in plain torch."""
    from megatron_slm.training.learning_rate import learning_rate

    config = configure(case, {})
    count = config.schedule.train_steps
    trainer = PlainTrainer(PlainDecoder(config.model, VOCABULARY, state), config.optimizer)
    samples = SyntheticSamples(count * SEQUENCES, case.endswith("isolated"))
    rows = []
    for step in range(count):
        rows.append(
            trainer.step(
                whole_batch(samples, range(step * SEQUENCES, (step + 1) * SEQUENCES)),
                rows_in_populations(case, SEQUENCES, POPULATION),
                None if case == "clm" else config.selection.keep_fraction,
                learning_rate(config, step + 1, count),
                micro_batches=[list(range(SEQUENCES))],
            )
        )
    return rows, {name: trainer.decoder.weight(name).detach() for name in trainer.decoder.names}


def assert_steps_equal_plain(ranks, case, rows):
    """The ranks' steps against the plain ones: chosen tokens, losses, gradient norm."""
    for step, (selected, loss_all, loss_selected, grad_norm) in enumerate(rows):
        last_stage = assert_same_step(ranks, step, selected, grad_norm)
        for found in last_stage:
            assert found.summary["loss/selected"] == pytest.approx(loss_selected, rel=2e-5), (
                f"step {step}: another loss of the selected tokens"
            )
            if case == "clm":
                assert found.summary["loss/all"] == pytest.approx(loss_all, rel=2e-5)


def assert_equals_plain(results, case, plain):
    """The ranks' results of a case against the plain rows and weights."""
    ranks = [rank[case] for rank in results]
    assert_steps_equal_plain(ranks, case, plain[0])
    weights = whole_weights(ranks)
    assert weights.keys() == plain[1].keys()
    for weight, expected in plain[1].items():
        torch.testing.assert_close(
            weights[weight], expected, rtol=2e-3, atol=2e-4, msg=f"{weight}: {{}}".format
        )


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(train_in_layout, TRIED, side_by_side=True)


@pytest.fixture(scope="module")
def plain(results):
    return {
        case: plain_rows(case, ranks[case]["before"])
        for ranks in results["single"]
        for case in ranks
    }


@pytest.mark.parametrize(
    "name, case", [(name, case) for name in EXACT for case in TRIED[name]["cases"]]
)
def test_layout_equals_plain_torch(name, case, results, plain):
    """At each of ten steps the same tokens, losses and gradient norm; after them the same weights,
    put together from all ranks.
    """
    assert_equals_plain(results[name], case, plain[case])


@pytest.mark.parametrize("name", ROUNDED)
def test_half_precision_is_near_plain_fp32(name, results, plain):
    """Gradients are accumulated in fp32; losses, norms, choices and the way the weights went are
    those of fp32 within rounding.
    """
    ranks = [rank["data_parallel"] for rank in results[name]]
    rows, expected_weights = plain["data_parallel"]
    for step, (selected, _, loss_selected, grad_norm) in enumerate(rows):
        chosen = set().union(*(rank["steps"][step].selected for rank in ranks))
        assert len(chosen & selected) / len(chosen | selected) > 0.9
        assert len(chosen) == len(selected)
        first = ranks[0]["steps"][step]
        assert first.summary["loss/selected"] == pytest.approx(loss_selected, rel=0.02)
        assert first.grad_norm == pytest.approx(grad_norm, rel=0.05)
    assert ranks[0]["gradient_dtypes"] == {torch.float32}
    weights = whole_weights(ranks)
    before = results["single"][0]["data_parallel"]["before"]
    moved = torch.cat([(expected_weights[key] - before[key]).flatten() for key in before])
    off = torch.cat([(weights[key] - expected_weights[key]).flatten() for key in before])
    assert off.norm() < 0.3 * moved.norm(), f"{off.norm() / moved.norm():.3f} of the way"


def test_recomputation_runs_again_what_it_says(results):
    """Selective: the attention core a second time, nothing else; full: whole layers."""
    calls = {
        name: results[layout][0]["data_parallel"]["calls"]
        for name, layout in (
            ("none", "single"),
            ("selective", "recompute_selective"),
            ("full", "recompute_full"),
        )
    }
    once = STEPS * (SEQUENCES // POPULATION) * 4
    assert calls == {
        "none": {"core_attention": once, "mlp": once},
        "selective": {"core_attention": 2 * once, "mlp": once},
        "full": {"core_attention": 2 * once, "mlp": 2 * once},
    }


def test_isolated_documents_change_the_losses(results):
    """So that the case above cannot pass with a mask that is never used."""
    packed, isolated = (
        results["single"][0][case]["steps"][0].summary for case in ("data_parallel", "isolated")
    )
    assert abs(packed["loss/selected"] - isolated["loss/selected"]) > 1e-3


def test_tensor_ranks_choose_identical_tokens(results):
    for name in ("tp2", "tp2_pp2", "tp2_dp2"):
        last_stage = [
            rank["data_parallel"] for rank in results[name] if rank["data_parallel"]["last_stage"]
        ]
        for step in range(STEPS):
            by_tensor_rank = {}
            for rank in last_stage:
                chosen = by_tensor_rank.setdefault(rank["tp_rank"], set())
                chosen.update(rank["steps"][step].selected)
            assert by_tensor_rank[0] == by_tensor_rank[1]


def test_keep_fraction_one_equals_plain_clm_exactly():
    """On data where every counted token has a score; same bits, not only close."""
    for clm, keep_all in run_on_cpu(train_keep_all_and_clm, dp=2):
        assert clm["losses"] == keep_all["losses"]
        assert clm["norms"] == keep_all["norms"]
        for name, weight in clm["weights"].items():
            assert torch.equal(weight, keep_all["weights"][name]), name


class FullyScored(SyntheticSamples):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["reference_loss"] = np.nan_to_num(sample["reference_loss"], nan=4.0)
        return sample


def train_keep_all_and_clm(groups):
    outcome = []
    for case in ("clm", "keep_all"):
        config = make_config(case, dict(dp=2))
        trainer = make_trainer(groups, config)
        batches = local_steps(groups, config, FullyScored(STEPS * SEQUENCES), STEPS)
        steps = list(train(trainer, config, batches, rate=1e-3))
        losses = [step.summary["loss/selected"] for step in steps]
        norms = [step.grad_norm for step in steps]
        outcome.append({"losses": losses, "norms": norms, "weights": weights_of(trainer)})
    return outcome
