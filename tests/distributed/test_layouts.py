"""One table: the same model, data and ten optimizer steps in every parallel layout, against plain single-process torch."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder, PlainTrainer
from megatron_slm.testing.spawn import run_layouts_on_cpu

STEPS, SEQUENCES, LENGTH, VOCABULARY = 10, 8, 16, 50
POPULATION = 4  # sequences that compete at once under scope data_parallel: dp * micro-batch size is this in every layout
KEEP = 0.6

EVERY_CASE = ("clm", "data_parallel", "sequence", "global_batch", "keep_all")
FEW = ("data_parallel",)
ISOLATED = ("data_parallel", "isolated")
# name -> parallel sizes and options; micro-batch size follows from POPULATION. Each exercises another path of megatron-core.
LAYOUTS = {
    "single": dict(cases=(*EVERY_CASE, "isolated")),
    "recompute_selective": dict(recompute="selective", cases=ISOLATED),
    "recompute_full": dict(recompute="full", cases=ISOLATED),
    "bf16": dict(precision="bf16", cases=FEW),
    "fp16": dict(precision="fp16", cases=FEW),
    "dp2": dict(dp=2, cases=(*EVERY_CASE, "isolated")),
    "tp2": dict(tp=2, cases=EVERY_CASE),
    "pp2": dict(pp=2, cases=(*EVERY_CASE, "isolated")),
    "tp2_sequence_parallel": dict(tp=2, sequence_parallel=True, cases=(*EVERY_CASE, "isolated")),
    "pp2_virtual2": dict(pp=2, vpp=2, cases=(*EVERY_CASE, "isolated")),
    "dp2_distributed_optimizer": dict(dp=2, distributed_optimizer=True, cases=EVERY_CASE),
    "dp2_overlap": dict(dp=2, distributed_optimizer=True, overlap=True, cases=EVERY_CASE),
    "dp2_bf16_distributed_optimizer": dict(
        dp=2, distributed_optimizer=True, precision="bf16", cases=FEW
    ),
    "dp2_fp16_distributed_optimizer": dict(
        dp=2, distributed_optimizer=True, precision="fp16", cases=FEW
    ),
    "cp2": dict(cp=2, cases=(*EVERY_CASE, "isolated")),
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
ROUNDED = [name for name, layout in LAYOUTS.items() if "precision" in layout]
EXACT = [name for name in LAYOUTS if name not in ROUNDED]


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
    )
    config.data = dataclasses.replace(
        config.data,
        sequence_length=LENGTH,
        global_batch_size=SEQUENCES,
        micro_batch_size=POPULATION // layout.get("dp", 1),
        document_policy="isolated" if case == "isolated" else "packed",
    )
    config.device.precision = layout.get("precision", "fp32")
    config.selection.keep_fraction = 1.0 if case == "keep_all" else KEEP
    config.selection.scorer = "none" if case == "clm" else "excess_loss"
    config.selection.scope = (
        case if case in ("data_parallel", "sequence", "global_batch") else "data_parallel"
    )
    config.selection.reference.scores = ["synthetic"]
    overlap = layout.get("overlap", False)
    config.parallel = dataclasses.replace(
        config.parallel,
        tensor=layout.get("tp", 1),
        pipeline=layout.get("pp", 1),
        virtual_pipeline=layout.get("vpp", 1),
        context=layout.get("cp", 1),
        sequence=layout.get("sequence_parallel", False),
        distributed_optimizer=layout.get("distributed_optimizer", False),
        overlap_grad_reduce=overlap,
        overlap_param_gather=overlap,
    )
    config.schedule.train_steps = STEPS
    config.optimizer.learning_rate = 3e-3
    return config


class SyntheticSamples:
    """Samples as ScoredDataset gives them: random tokens, some masked labels, some tokens without a score, many tied scores.

    With `isolate_documents`, of one to four documents, whose first tokens are no targets.
    """

    def __init__(self, isolate_documents=False):
        self.isolate_documents = isolate_documents

    def __len__(self):
        return STEPS * SEQUENCES

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        text = random.integers(0, VOCABULARY, LENGTH + 1)
        reference = np.round(random.uniform(3, 5, LENGTH), 1).astype(np.float32)
        reference[random.random(LENGTH) < 0.05] = np.nan
        sample = {
            "tokens": text[:-1],
            "labels": text[1:],
            "loss_mask": (random.random(LENGTH) > 0.1).astype(np.float32),
            "position_ids": np.arange(LENGTH),
            "corpus_id": np.int64(0),
            "reference_loss": reference,
        }
        if self.isolate_documents:
            begins = np.unique([0, *random.integers(1, LENGTH, index % 4)])
            sample["document_start"] = begins[
                np.searchsorted(begins, np.arange(LENGTH), side="right") - 1
            ]
            sample["position_ids"] = sample["position_ids"] - sample["document_start"]
            sample["loss_mask"][begins[1:] - 1] = 0.0
        return sample


def train_in_layout(groups, layouts):
    """Ten real steps in this layout: per step (selected ids of this rank, loss/all, loss/selected, grad norm), the weights at start (this
    rank's, by local name) and at the end (this rank's shards, by global name and place), and how often parts of the model ran."""
    from megatron.core.utils import unwrap_model

    from megatron_slm.data.batch import slice_for_context_parallel
    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.monitoring import Metrics
    from megatron_slm.parallel import seed_everything
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.selection.diagnostics import summarise
    from megatron_slm.training.learning_rate import learning_rate
    from megatron_slm.training.step import Trainer, train_step
    from megatron_slm.training.token_selector import TokenSelector

    layout = next(spec for spec in layouts.values() if _matches(groups, spec))
    layouts.pop(
        next(name for name, spec in layouts.items() if spec is layout)
    )  # this process's own copy: next time the next layout
    results = {}
    for case in layout["cases"]:
        config = make_config(case, layout)
        seed_everything(config.run.seed, groups)
        models = wrap_data_parallel(build_model(config, VOCABULARY, groups), config)
        weights_before = {
            name: p.detach().clone()
            for chunk in unwrap_model(models)
            for name, p in chunk.named_parameters()
        }
        selector = TokenSelector(config.selection, groups, sequence_length=LENGTH, corpora=1)
        trainer = Trainer(models, build_optimizer(models, config), selector, groups)
        loader = TrainingLoader(
            SyntheticSamples(case == "isolated"),
            global_batch_size=SEQUENCES,
            micro_batch_size=config.data.micro_batch_size,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
        )
        chosen, metrics, rows = [], Metrics(groups.device), []
        spy_on_selection(selector, chosen)
        calls = count_calls(unwrap_model(models))
        for step in range(STEPS):
            batches = [
                slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size)
                for batch in loader.next_step()
            ]
            report = train_step(
                trainer,
                batches,
                TrainingProgress(step, step * SEQUENCES * LENGTH),
                learning_rate(config, step + 1, config.schedule.train_steps),
            )
            metrics.add_all(report.measured)
            summary = metrics.reduce(groups.dp_cp, summarise=summarise)
            rows.append(
                (
                    set().union(*chosen),
                    summary.get("loss/all"),
                    summary.get("loss/selected"),
                    report.grad_norm,
                )
            )
            chosen.clear()
        loader.close()
        for model in models:  # overlap: the last update's gather is still under way
            model.disable_forward_pre_hook() if config.parallel.overlap_param_gather else None
        gradient_dtypes = {
            parameter.main_grad.dtype
            for chunk in unwrap_model(models)
            for parameter in chunk.parameters()
        }
        results[case] = {
            "rows": rows,
            "before": weights_before,
            "shards": weight_shards(unwrap_model(models)),
            "last_stage": groups.is_last_stage,
            "tp_rank": groups.tp_rank,
            "calls": calls,
            "gradient_dtypes": gradient_dtypes,
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
    """(global name, global shape, place in it, values) of every part of a weight this rank holds."""
    from megatron.core.dist_checkpointing.dict_utils import nested_values
    from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories

    sharded = {number: chunk.sharded_state_dict() for number, chunk in enumerate(chunks)}
    apply_factories(sharded)
    shards = []
    for tensor in nested_values(sharded):
        if isinstance(tensor, ShardedTensor):
            stacked = tensor.prepend_axis_num
            inside = tuple(
                slice(o, o + n)
                for o, n in zip(tensor.global_offset[stacked:], tensor.local_shape, strict=True)
            )
            shards.append(
                (
                    tensor.key,
                    tensor.global_shape,
                    (*tensor.global_offset[:stacked], *inside),
                    tensor.data.detach().float().clone(),
                )
            )
    return shards


def whole_weights(ranks):
    """The full weights of a layout under megatron-core's names in one process, from the shards of all its ranks; NaN where no rank holds any."""
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
            # stored under the names of Transformer Engine's fused layers, so that its checkpoints and ours are one
            rest = key.removeprefix("decoder.layers.").replace(
                "self_attention.linear_qkv.layer_norm_weight", "input_layernorm.weight"
            )
            rest = rest.replace("mlp.linear_fc1.layer_norm_weight", "pre_mlp_layernorm.weight")
            weights |= {f"decoder.layers.{layer}.{rest}": part for layer, part in enumerate(full)}
        else:
            weights[key] = full
    return weights


def _matches(groups, spec):
    return (
        groups.tp_size,
        groups.pp_size,
        groups.virtual_chunks,
        groups.cp_size,
        groups.dp_size,
    ) == (
        spec.get("tp", 1),
        spec.get("pp", 1),
        spec.get("vpp", 1),
        spec.get("cp", 1),
        spec.get("dp", 1),
    )


def spy_on_selection(selector, chosen):
    """Note the ids of every token that a selection keeps."""
    describe = selector.describe

    def noting(batch, outputs, selection, progress):
        chosen.append(set(batch.token_id_BS[selection.mask].tolist()))
        return describe(batch, outputs, selection, progress)

    selector.describe = noting


def plain_rows(case, state):
    """The same ten steps in plain torch."""
    from megatron_slm.training.learning_rate import learning_rate

    config = make_config(case, {})
    trainer = PlainTrainer(PlainDecoder(config.model, VOCABULARY, state), config.optimizer)
    samples, rows = SyntheticSamples(case == "isolated"), []
    everything = list(range(SEQUENCES))
    populations = {"sequence": [[row] for row in everything], "global_batch": [everything]}.get(
        case, [everything[i : i + POPULATION] for i in range(0, SEQUENCES, POPULATION)]
    )
    for step in range(STEPS):
        picked = [samples[step * SEQUENCES + i] for i in everything]
        batch = {
            name: torch.from_numpy(np.stack([sample[name] for sample in picked]))
            for name in picked[0]
        }
        rows.append(
            trainer.step(
                batch,
                populations,
                None if case == "clm" else config.selection.keep_fraction,
                learning_rate(config, step + 1, config.schedule.train_steps),
            )
        )
    return rows, {name: trainer.decoder.weight(name).detach() for name in trainer.decoder.names}


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(train_in_layout, LAYOUTS, dict(LAYOUTS))


@pytest.fixture(scope="module")
def plain(results):
    return {
        case: plain_rows(case, ranks[case]["before"])
        for ranks in results["single"]
        for case in ranks
    }


@pytest.mark.parametrize(
    "name, case", [(name, case) for name in EXACT for case in LAYOUTS[name]["cases"]]
)
def test_layout_equals_plain_torch(name, case, results, plain):
    """At each of ten steps the same tokens, losses and gradient norm; after them the same weights, put together from all ranks."""
    ranks = [rank[case] for rank in results[name]]
    last_stage = [rank for rank in ranks if rank["last_stage"]]
    for step, (selected, loss_all, loss_selected, grad_norm) in enumerate(plain[case][0]):
        assert set().union(*(rank["rows"][step][0] for rank in last_stage)) == selected, (
            f"step {step}: another set of tokens"
        )
        for rank in ranks:
            assert rank["rows"][step][3] == pytest.approx(grad_norm, rel=2e-4), (
                f"step {step}: another gradient norm"
            )
        for rank in last_stage:
            assert rank["rows"][step][2] == pytest.approx(loss_selected, rel=2e-5), (
                f"step {step}: another loss of the selected tokens"
            )
            if case == "clm":
                assert rank["rows"][step][1] == pytest.approx(loss_all, rel=2e-5)
    weights = whole_weights(ranks)
    assert weights.keys() == plain[case][1].keys()
    for weight, expected in plain[case][1].items():
        torch.testing.assert_close(
            weights[weight], expected, rtol=2e-3, atol=2e-4, msg=f"{weight}: {{}}".format
        )


@pytest.mark.parametrize("name", ROUNDED)
def test_half_precision_is_near_plain_fp32(name, results, plain):
    """Gradients are accumulated in fp32; losses, norms, choices and the way the weights went are those of fp32 within rounding."""
    ranks = [rank["data_parallel"] for rank in results[name]]
    rows, expected_weights = plain["data_parallel"]
    for step, (selected, _, loss_selected, grad_norm) in enumerate(rows):
        chosen = set().union(*(rank["rows"][step][0] for rank in ranks))
        assert len(chosen & selected) / len(chosen | selected) > 0.9
        assert len(chosen) == len(selected)
        assert ranks[0]["rows"][step][2] == pytest.approx(loss_selected, rel=0.02)
        assert ranks[0]["rows"][step][3] == pytest.approx(grad_norm, rel=0.05)
    assert ranks[0]["gradient_dtypes"] == {torch.float32}
    weights, before = whole_weights(ranks), results["single"][0]["data_parallel"]["before"]
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
        results["single"][0][case]["rows"][0][2] for case in ("data_parallel", "isolated")
    )
    assert abs(packed - isolated) > 1e-3


def test_tensor_ranks_choose_identical_tokens(results):
    for name in ("tp2", "tp2_pp2", "tp2_dp2"):
        last_stage = [
            rank["data_parallel"] for rank in results[name] if rank["data_parallel"]["last_stage"]
        ]
        for step in range(STEPS):
            by_tensor_rank = {}
            for rank in last_stage:
                by_tensor_rank.setdefault(rank["tp_rank"], set()).update(rank["rows"][step][0])
            assert by_tensor_rank[0] == by_tensor_rank[1]


def test_keep_fraction_one_equals_plain_clm_exactly():
    """On data where every counted token has a score; same bits, not only close."""
    results = run_layouts_on_cpu(train_keep_all_and_clm, {"dp2": dict(dp=2)})
    for clm, keep_all in results["dp2"]:
        assert clm["losses"] == keep_all["losses"]
        assert clm["norms"] == keep_all["norms"]
        assert all(
            torch.equal(clm["weights"][name], keep_all["weights"][name]) for name in clm["weights"]
        )


class FullyScored(SyntheticSamples):
    def __getitem__(self, index):
        sample = super().__getitem__(index)
        sample["reference_loss"] = np.nan_to_num(sample["reference_loss"], nan=4.0)
        return sample


def train_keep_all_and_clm(groups):
    from megatron.core.utils import unwrap_model

    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection import TrainingProgress
    from megatron_slm.selection.diagnostics import summarise
    from megatron_slm.training.step import Trainer, train_step
    from megatron_slm.training.token_selector import TokenSelector

    outcome = []
    for case in ("clm", "keep_all"):
        config = make_config(case, dict(dp=2))
        models = wrap_data_parallel(build_model(config, VOCABULARY, groups), config)
        trainer = Trainer(
            models,
            build_optimizer(models, config),
            TokenSelector(config.selection, groups, sequence_length=LENGTH, corpora=1),
            groups,
        )
        loader = TrainingLoader(
            FullyScored(),
            global_batch_size=SEQUENCES,
            micro_batch_size=2,
            dp_rank=groups.dp_rank,
            dp_size=groups.dp_size,
        )
        metrics, losses, norms = Metrics(groups.device), [], []
        for step in range(STEPS):
            report = train_step(trainer, loader.next_step(), TrainingProgress(step, 0), 1e-3)
            metrics.add_all(report.measured)
            losses.append(metrics.reduce(groups.dp_cp, summarise=summarise)["loss/selected"])
            norms.append(report.grad_norm)
        loader.close()
        outcome.append(
            {
                "losses": losses,
                "norms": norms,
                "weights": {
                    name: p.detach().clone()
                    for name, p in unwrap_model(models)[0].named_parameters()
                },
            }
        )
    return outcome
