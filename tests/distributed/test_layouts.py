"""One table: the same model, data and ten optimizer steps in every parallel layout, against plain single-process torch."""

import dataclasses

import numpy as np
import pytest
import torch

from megatron_slm.config.schema import Config
from megatron_slm.testing.plain import PlainDecoder, PlainTrainer
from megatron_slm.testing.spawn import run_layouts_on_cpu

STEPS, SEQUENCES, LENGTH, VOCABULARY = 10, 8, 16, 50
POPULATION = 4      # sequences that compete at once under scope data_parallel: dp * micro-batch size is this in every layout
KEEP = 0.6

# name -> parallel sizes; micro-batch size follows from POPULATION. Each exercises another path of megatron-core.
LAYOUTS = {
    "single": dict(),
    "dp2": dict(dp=2),
    "tp2": dict(tp=2),
    "pp2": dict(pp=2),
    "tp2_pp2": dict(tp=2, pp=2),
    "tp2_dp2": dict(tp=2, dp=2),
    "tp2_sequence_parallel": dict(tp=2, sequence_parallel=True),
    "pp2_virtual2": dict(pp=2, vpp=2),
    "dp2_distributed_optimizer": dict(dp=2, distributed_optimizer=True),
    "dp2_overlap": dict(dp=2, distributed_optimizer=True, overlap=True),
    "cp2": dict(cp=2),
    "tp2_pp2_sequence_parallel": dict(tp=2, pp=2, sequence_parallel=True),
}
CASES = ("clm", "data_parallel", "sequence", "global_batch", "keep_all")


def make_config(case: str, layout: dict) -> Config:
    config = Config()
    config.model = dataclasses.replace(config.model, layers=4, hidden_size=32, ffn_hidden_size=48, attention_heads=4, query_groups=2,
                                       pad_vocabulary_to_multiple_of=64, initialization_std=0.1, tied_embeddings=case == "sequence")
    config.data = dataclasses.replace(config.data, sequence_length=LENGTH, global_batch_size=SEQUENCES, micro_batch_size=POPULATION // layout.get("dp", 1))
    config.selection.keep_fraction = 1.0 if case == "keep_all" else KEEP
    config.selection.scorer = "none" if case == "clm" else "excess_loss"
    config.selection.scope = case if case in ("data_parallel", "sequence", "global_batch") else "data_parallel"
    config.selection.reference.scores = ["synthetic"]
    overlap = layout.get("overlap", False)
    config.parallel = dataclasses.replace(config.parallel, tensor=layout.get("tp", 1), pipeline=layout.get("pp", 1), virtual_pipeline=layout.get("vpp", 1),
                                          context=layout.get("cp", 1), sequence=layout.get("sequence_parallel", False),
                                          distributed_optimizer=layout.get("distributed_optimizer", False), overlap_grad_reduce=overlap, overlap_param_gather=overlap)
    config.schedule.train_steps = STEPS
    config.optimizer.learning_rate = 3e-3
    return config


class SyntheticSamples:
    """Samples as ScoredDataset gives them: random tokens, some masked labels, some tokens without a score, many tied scores."""

    def __len__(self):
        return STEPS * SEQUENCES

    def __getitem__(self, index):
        random = np.random.default_rng(index)
        text = random.integers(0, VOCABULARY, LENGTH + 1)
        reference = np.round(random.uniform(3, 5, LENGTH), 1).astype(np.float32)
        reference[random.random(LENGTH) < 0.05] = np.nan
        return {"tokens": text[:-1], "labels": text[1:], "loss_mask": (random.random(LENGTH) > 0.1).astype(np.float32),
                "position_ids": np.arange(LENGTH), "corpus_id": np.int64(0), "reference_loss": reference}


def train_in_layout(groups, layouts, cases):
    """Ten real steps in this layout: per step (selected ids of this rank, loss/all, loss/selected, grad norm), and weights at start and end."""
    from megatron.core.utils import unwrap_model
    from megatron_slm.data.batch import slice_for_context_parallel
    from megatron_slm.data.loader import TrainingLoader
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel
    from megatron_slm.parallel import seed_everything
    from megatron_slm.selection import Progress
    from megatron_slm.training import step as step_room
    from megatron_slm.training.choose import Chooser
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection.diagnostics import summarise
    from megatron_slm.training.learning_rate import learning_rate

    layout = next(spec for spec in layouts.values() if _matches(groups, spec))
    layouts.pop(next(name for name, spec in layouts.items() if spec is layout))     # this process's own copy: next time the next layout
    results = {}
    for case in cases:
        config = make_config(case, layout)
        seed_everything(config.run.seed, groups)
        models = wrap_data_parallel(build_model(config, VOCABULARY, groups), config)
        weights_before = {name: p.detach().clone() for chunk in unwrap_model(models) for name, p in chunk.named_parameters()}
        chooser = Chooser(config.selection, groups, sequence_length=LENGTH, corpora=1)
        trainer = step_room.Trainer(models, build_optimizer(models, config), chooser, groups)
        loader = TrainingLoader(SyntheticSamples(), global_batch_size=SEQUENCES, micro_batch_size=config.data.micro_batch_size, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        chosen, metrics, rows = [], Metrics(groups.device), []
        spy_on_selection(chooser, chosen)
        for step in range(STEPS):
            batches = [slice_for_context_parallel(batch, groups.cp_rank, groups.cp_size) for batch in loader.next_step()]
            report = step_room.train_step(trainer, batches, Progress(step, step * SEQUENCES * LENGTH), learning_rate(config, step + 1))
            metrics.add_all(report.measured)
            summary = metrics.reduce(groups.dp_cp, summarise=summarise)
            rows.append((set().union(*chosen), summary.get("loss/all"), summary.get("loss/selected"), report.grad_norm))
            chosen.clear()
        loader.close()
        weights = {name: p.detach().clone() for chunk in unwrap_model(models) for name, p in chunk.named_parameters()}
        results[case] = {"rows": rows, "before": weights_before, "after": weights, "last_stage": groups.is_last_stage, "tp_rank": groups.tp_rank}
    return results


def _matches(groups, spec):
    return (groups.tp_size, groups.pp_size, groups.virtual_chunks, groups.cp_size, groups.dp_size) == (
        spec.get("tp", 1), spec.get("pp", 1), spec.get("vpp", 1), spec.get("cp", 1), spec.get("dp", 1))


def spy_on_selection(chooser, chosen):
    """Note the ids of every token that a selection keeps."""
    describe = chooser.describe

    def noting(batch, outputs, selection, progress):
        chosen.append(set(batch.token_id_BS[selection.mask].tolist()))
        return describe(batch, outputs, selection, progress)
    chooser.describe = noting


def plain_rows(case, state):
    """The same ten steps in plain torch."""
    from megatron_slm.training.learning_rate import learning_rate
    config = make_config(case, {})
    trainer = PlainTrainer(PlainDecoder(config.model, VOCABULARY, state), config.optimizer)
    samples, rows = SyntheticSamples(), []
    everything = list(range(SEQUENCES))
    populations = {"sequence": [[row] for row in everything], "global_batch": [everything]}.get(
        case, [everything[i:i + POPULATION] for i in range(0, SEQUENCES, POPULATION)])
    for step in range(STEPS):
        picked = [samples[step * SEQUENCES + i] for i in everything]
        batch = {name: torch.from_numpy(np.stack([sample[name] for sample in picked])) for name in picked[0]}
        rows.append(trainer.step(batch, populations, None if case == "clm" else config.selection.keep_fraction, learning_rate(config, step + 1)))
    return rows, {name: trainer.decoder.weight(name).detach() for name in trainer.decoder.names}


@pytest.fixture(scope="module")
def results():
    return run_layouts_on_cpu(train_in_layout, LAYOUTS, dict(LAYOUTS), CASES)


@pytest.fixture(scope="module")
def plain(results):
    return {case: plain_rows(case, results["single"][0][case]["before"]) for case in CASES}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", LAYOUTS)
def test_layout_equals_plain_torch(name, case, results, plain):
    ranks = [rank[case] for rank in results[name]]
    last_stage = [rank for rank in ranks if rank["last_stage"]]
    for step, (selected, loss_all, loss_selected, grad_norm) in enumerate(plain[case][0]):
        assert set().union(*(rank["rows"][step][0] for rank in last_stage)) == selected, f"step {step}: another set of tokens"
        for rank in ranks:
            assert rank["rows"][step][3] == pytest.approx(grad_norm, rel=2e-4), f"step {step}: another gradient norm"
        for rank in last_stage:
            assert rank["rows"][step][2] == pytest.approx(loss_selected, rel=2e-5), f"step {step}: another loss of the selected tokens"
            if case == "clm":
                assert rank["rows"][step][1] == pytest.approx(loss_all, rel=2e-5)


@pytest.mark.parametrize("name", ["single", "dp2", "dp2_distributed_optimizer", "dp2_overlap", "cp2"])
def test_weights_after_ten_steps_equal_plain_torch(name, results, plain):
    for rank in results[name]:
        for weight, expected in plain["data_parallel"][1].items():
            torch.testing.assert_close(rank["data_parallel"]["after"][weight], expected, rtol=2e-3, atol=2e-4)


def test_tensor_ranks_choose_identical_tokens(results):
    for name in ("tp2", "tp2_pp2", "tp2_dp2"):
        last_stage = [rank["data_parallel"] for rank in results[name] if rank["data_parallel"]["last_stage"]]
        for step in range(STEPS):
            by_tensor_rank = {}
            for rank in last_stage:
                by_tensor_rank.setdefault(rank["tp_rank"], set()).update(rank["rows"][step][0])
            assert by_tensor_rank[0] == by_tensor_rank[1]


def test_keep_fraction_one_equals_plain_clm_exactly():
    """On data where every counted token has a score; same bits, not only close."""
    results = run_layouts_on_cpu(train_keep_all_and_clm, {"dp2": dict(dp=2)})
    for clm, keep_all in results["dp2"]:
        assert clm["losses"] == keep_all["losses"] and clm["norms"] == keep_all["norms"]
        assert all(torch.equal(clm["weights"][name], keep_all["weights"][name]) for name in clm["weights"])


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
    from megatron_slm.selection import Progress
    from megatron_slm.training.choose import Chooser
    from megatron_slm.monitoring import Metrics
    from megatron_slm.selection.diagnostics import summarise
    from megatron_slm.training.step import Trainer, train_step

    outcome = []
    for case in ("clm", "keep_all"):
        config = make_config(case, dict(dp=2))
        models = wrap_data_parallel(build_model(config, VOCABULARY, groups), config)
        trainer = Trainer(models, build_optimizer(models, config), Chooser(config.selection, groups, sequence_length=LENGTH, corpora=1), groups)
        loader = TrainingLoader(FullyScored(), global_batch_size=SEQUENCES, micro_batch_size=2, dp_rank=groups.dp_rank, dp_size=groups.dp_size)
        metrics, losses, norms = Metrics(groups.device), [], []
        for step in range(STEPS):
            report = train_step(trainer, loader.next_step(), Progress(step, 0), 1e-3)
            metrics.add_all(report.measured)
            losses.append(metrics.reduce(groups.dp_cp, summarise=summarise)["loss/selected"])
            norms.append(report.grad_norm)
        loader.close()
        outcome.append({"losses": losses, "norms": norms, "weights": {name: p.detach().clone() for name, p in unwrap_model(models)[0].named_parameters()}})
    return outcome
