"""The plan by hand for small cases, and its proposals."""

import importlib.util
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest

from megatron_slm.config.check import check_config
from megatron_slm.config.load import load_yaml, parse_config
from megatron_slm.data.score_manifest import ScoreManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.planning.communication import traffic
from megatron_slm.planning.duration import bubble_fraction, duration
from megatron_slm.planning.hardware import GPUS, find_gpu
from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import chunks_in_flight, rank_memory, state_bytes, usable_bytes
from megatron_slm.planning.parameters import active_parameters, model_parameters, stage_parameters
from megatron_slm.planning.propose import fits, propose
from megatron_slm.planning.result import checkpoints_on_disk
from megatron_slm.planning.work import score_store_bytes, scoring, work

ROOT = Path(__file__).parents[3]
RECIPES = ROOT / "launch" / "recipes"


def job(recipe: str, nodes: int, *overrides: str, gpu: str = "H100", **options) -> Job:
    config = parse_config(["--config", str(RECIPES / f"{recipe}.yaml"), *overrides], "test", "")
    return Job(config, config.model.vocabulary_size, find_gpu(gpu), nodes, **options)


def tinyllama(*overrides: str, **options) -> Job:
    return job("tinyllama_1.1b_math_slm", 4, *overrides, **options)


@pytest.mark.parametrize(
    "recipe, count",
    [
        ("tinyllama_1.1b_math_slm", 1_100_048_384),
        ("llama3_8b_slm", 8_030_261_248),
        ("llama3_70b_slm", 70_553_706_496),
    ],
)
def test_parameters_are_the_published_ones(recipe, count):
    assert model_parameters(job(recipe, 256)).total == count


def test_chunks_in_flight():
    """1F1B: the first stage holds as many micro-batches as there are stages.

    Interleaved: a factor 1 + (p - 1) / (p v) of all layers.
    """
    plain = job("llama3_70b_slm", 256, "--parallel.virtual_pipeline", "1")
    assert [chunks_in_flight(plain, stage) for stage in range(4)] == [4, 3, 2, 1]
    interleaved = job("llama3_70b_slm", 256)
    assert chunks_in_flight(interleaved, 0) == 4 * 5 + 3
    few = job(
        "llama3_70b_slm", 256, "--parallel.virtual_pipeline", "1", "--data.global_batch_size", "128"
    )
    assert few.micro_batches == 2
    assert [chunks_in_flight(few, stage) for stage in range(4)] == [
        2,
        2,
        2,
        1,
    ]


def test_the_bubble():
    assert bubble_fraction(job("llama3_70b_slm", 256)) == 3 / (5 * 32)


def sent(planned: Job, stage: int = 0) -> dict[str, float]:
    return {each.name: each.sent_bytes for each in traffic(planned, stage)}


def test_traffic_by_hand():
    count = 1_100_048_384
    found = sent(tinyllama())
    assert found["reduce-scatter of gradients"] == pytest.approx(4 * count * 31 / 32)
    assert found["all-gather of weights"] == pytest.approx(2 * count * 31 / 32)
    assert (
        found["all-gather of scores"] == 4 * 8 * 2048 * 31 * 2
    )  # fp32, 8 x 2048 tokens of each of 31 other ranks, 2 micro-batches
    assert sent(
        tinyllama(
            "--parallel.distributed_optimizer", "false", "--parallel.overlap_param_gather", "false"
        )
    )["all-reduce of gradients"] == pytest.approx(8 * count * 31 / 32)


def test_tensor_parallel_traffic_by_hand():
    """Without sequence parallelism: 4 all-reduces per layer and 1 at the embedding, each 2 (t - 1)
    / t of a 32 MiB message; the head's kept rows.
    """
    planned = job("tinyllama_1.1b_math_slm", 4, "--parallel.tensor", "2")
    message, vectors = 8 * 2048 * 2048 * 2, 8 * 8 * 2048 * 2
    by_hand = planned.micro_batches * (0.5 * message * (22 * 8 + 2 + 2 * 0.6) + 0.5 * vectors)
    assert sent(planned)["all-reduce of activations"] == pytest.approx(by_hand)


def test_links():
    """Tensor groups stay in a node; a data-parallel ring leaves it through as many ports as it has
    ranks there.
    """
    found = {each.name: each for each in traffic(job("llama3_8b_slm", 16), 0)}
    assert found["all-gather, reduce-scatter of activations"].link == "NVLink"
    gradients = found["reduce-scatter of gradients"]
    assert gradients.link == "network"
    assert gradients.seconds == pytest.approx(gradients.sent_bytes / (4 * 50e9 * 0.8))


def test_selection_saves_head_work_and_plain_training_does_not():
    selective, plain = work(tinyllama()), work(job("tinyllama_1.1b_math_clm", 4))
    head = 2 * 2048 * 32000
    assert (selective.head, plain.head) == (pytest.approx(head * 2.2), head * 3)
    assert plain.executed == plain.model


def test_what_costs_more():
    base, online = (
        tinyllama(),
        tinyllama(
            "--selection.reference.scores",
            "[]",
            "--selection.reference.checkpoint",
            "runs/reference",
        ),
    )
    assert work(online).reference * 3 == work(base).model
    assert rank_memory(online, 0).reference == 2 * 1_100_048_384
    twice = tinyllama("--selection.scope", "global_batch")
    assert work(twice).choosing * 3 == work(base).model
    again = tinyllama("--model.recompute", "full")
    assert work(again).recomputed * 3 == work(again).layers
    assert rank_memory(again, 0).activations < rank_memory(base, 0).activations / 10
    assert (
        duration(online).tokens_per_second
        < duration(base).tokens_per_second
        > duration(again).tokens_per_second
    )


def mixtral(*overrides: str) -> Job:
    """Mixtral-8x7B on 64 GPUs: 46.7 B parameters, 12.9 B of which a token meets."""
    return job(
        "llama3_8b_slm",
        8,
        "--model.vocabulary_size",
        "32000",
        "--model.experts",
        "8",
        "--parallel.expert",
        "8",
        "--parallel.expert_tensor",
        "1",
        *overrides,
    )


def test_experts_by_hand():
    planned = mixtral()
    whole, held = model_parameters(planned), stage_parameters(planned, 0)
    assert (whole.total, active_parameters(planned)) == (46_702_792_704, 12_879_925_248)
    assert held.experts == 32 * 3 * 14336 * 4096  # one expert of each layer
    weights, gradients, optimizer = state_bytes(planned, 0)
    assert (weights, gradients) == (2 * held.total, 4 * held.total)
    assert (
        optimizer == -(-12 * held.dense // 32) + 12 * held.experts // 8
    )  # 64 / 2 dense replicas; 64 / 8 ranks hold an expert
    found = sent(planned)
    rows = 8192 // 2 * 2 * 4096 * 2  # a rank's half sequence, 2 experts a token
    assert found["all-to-all of tokens"] == rows * 7 / 8 * 4 * 32 * planned.micro_batches
    assert found["reduce-scatter of gradients of experts"] == 4 * held.experts * 7 / 8
    assert "all-gather, reduce-scatter inside experts" not in found
    assert (
        sent(mixtral("--parallel.expert_tensor", "2"))["all-gather, reduce-scatter inside experts"]
        > 0
    )


def test_isolated_documents_keep_a_mask():
    """A bias of 2 bytes per query and key and layer, beside what the torch-native norms keep;
    recomputed attention keeps none.
    """
    torch_native, isolated = (
        rank_memory(tinyllama(*words), 0).activations
        for words in (("--device.layers", "torch"), ("--data.document_policy", "isolated"))
    )
    assert isolated - torch_native == 22 * 8 * 2048 * 2048 * 2
    recomputed = rank_memory(
        tinyllama("--data.document_policy", "isolated", "--model.recompute", "selective"), 0
    ).activations
    assert recomputed < torch_native


def test_fused_passes_keep_no_fp32_copies_and_no_joint_product():
    """Per token and layer two norms' inputs at 2 bytes for 4, and (a + 2g)d values for (2a + 3g)d;
    the last norm's input besides. With norms of queries and keys the joint product stays.
    """
    without, fused, normed, normed_without = (
        rank_memory(tinyllama("--device.layers", "torch", *words), 0).activations
        for words in (
            ("--device.fused_layers", "none"),
            (),
            ("--model.qk_norm", "true"),
            ("--model.qk_norm", "true", "--device.fused_layers", "none"),
        )
    )
    tokens = 8 * 2048
    norms = 22 * 2 * 2048 * 2 + 2048 * 2
    assert without - fused == tokens * (norms + 22 * (32 + 4) * 64 * 2)
    assert normed_without - normed == tokens * (norms + 22 * (32 + 4) * 64 * 2)


def test_efficiency_is_what_a_run_without_waiting_shows():
    planned = replace(tinyllama("--selection.keep_fraction", "1.0"), stated_efficiency=0.4)
    assert duration(planned).model_flops_utilization == pytest.approx(0.4, rel=2e-3)


ONE_MICRO_BATCH = ("--data.global_batch_size", "8", "--data.micro_batch_size", "8")


@pytest.mark.parametrize(
    "layers, step_seconds, utilization, online_ratio, scored_tokens_per_second",
    [
        ("torch", 0.2857, 0.392, 1.279 / 0.986, 194_800),
        ("transformer_engine", 0.2478, 0.452, 1.294 / 0.983, 213_000),
    ],
)
def test_the_step_that_was_measured_on_one_h200_is_predicted(
    layers, step_seconds, utilization, online_ratio, scored_tokens_per_second
):
    """benchmarks/RESULTS.md, G6 to G9: 8 x 2048 tokens, bf16, a same-size reference in G7."""
    options = (*ONE_MICRO_BATCH, "--device.layers", layers)
    measured = job("tinyllama_1.1b_math_slm", 1, *options, gpu="H200", gpus_per_node=1)
    predicted = duration(measured)
    assert predicted.step_seconds == pytest.approx(step_seconds, rel=0.01)
    assert predicted.model_flops_utilization == pytest.approx(utilization, rel=0.01)
    online = job(
        "tinyllama_1.1b_math_slm",
        1,
        *options,
        "--selection.reference.scores",
        "[]",
        "--selection.reference.checkpoint",
        "reference",
        gpu="H200",
        gpus_per_node=1,
    )
    ratio = duration(online).step_seconds / predicted.step_seconds
    assert ratio == pytest.approx(online_ratio, rel=0.01)
    scored = scoring(measured)
    seconds = scored.gpu_hours * 3600
    assert scored.tokens / seconds == pytest.approx(scored_tokens_per_second, rel=0.01)


def test_checkpoints_on_disk():
    config = tinyllama().config
    assert checkpoints_on_disk(config, 14306) == 2 + 1  # two kept, one being written
    assert (
        checkpoints_on_disk(
            replace(config, checkpoint=replace(config.checkpoint, keep_every_steps=5000)), 14306
        )
        == 2 + 2 + 1
    )
    assert (
        checkpoints_on_disk(
            replace(config, checkpoint=replace(config.checkpoint, keep_best=3)), 14306
        )
        == 2 + 3 + 1
    )
    assert (
        checkpoints_on_disk(
            replace(config, checkpoint=replace(config.checkpoint, interval_steps=0)), 14306
        )
        == 1
    )


def test_score_store_is_as_large_as_planned(tmp_path):
    tokens = 12_345
    ScoreStore.create(
        tmp_path / "scores",
        ScoreManifest("c", tokens, 1, "t", "r", "reference", 64, 64, "packed", 1 << 18),
    )
    assert (tmp_path / "scores" / "loss.bin").stat().st_size == score_store_bytes(tokens)


@pytest.mark.parametrize(
    "recipe, nodes, gpu",
    [
        ("tinyllama_1.1b_math_slm", 1, "A100 40GB"),
        ("llama3_8b_slm", 16, "H100"),
        ("llama3_70b_slm", 32, "H200"),
    ],
)
def test_proposals_are_accepted_by_train_and_fit(recipe, nodes, gpu):
    planned = job(recipe, nodes, gpu=gpu)
    proposals = propose(planned, 6)
    assert proposals
    for each in proposals:
        config = parse_config(
            ["--config", str(RECIPES / f"{recipe}.yaml"), *each.overrides.split()], "test", ""
        )
        assert config == each.job.config
        check_config(config, planned.ranks)
        assert each.memory.total <= usable_bytes(planned)
    speeds = [each.duration.tokens_per_second for each in proposals]
    assert all(later <= sooner * 1.006 for sooner, later in pairwise(speeds))


def test_no_layout_fits_a_model_that_is_too_large():
    planned = job(
        "llama3_70b_slm",
        1,
        "--parallel.pipeline",
        "1",
        "--parallel.virtual_pipeline",
        "1",
        "--data.global_batch_size",
        "64",
    )
    assert not fits(planned)
    assert propose(planned, 3) == []


def test_every_gpu_is_found_by_its_name():
    assert [find_gpu(gpu.name) for gpu in GPUS] == list(GPUS)
    assert find_gpu("NVIDIA H100 80GB HBM3").name == "H100"
    assert find_gpu("NVIDIA A100-SXM4-40GB").name == "A100 40GB"


def test_recipes_of_the_guide_fit():
    for recipe, nodes in (
        ("tinyllama_1.1b_math_slm", 4),
        ("llama3_8b_slm", 16),
        ("llama3_70b_slm", 256),
    ):
        assert fits(job(recipe, nodes)), recipe
    assert load_yaml(RECIPES / "llama3_70b_slm.yaml").model.layers == 80


def test_the_guides_tables_are_up_to_date():
    spec = importlib.util.spec_from_file_location("scale_tables", ROOT / "docs" / "scale_tables.py")
    tables = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(tables)
    assert tables.page() == tables.PAGE.read_text(encoding="utf-8"), (
        "run: python docs/scale_tables.py"
    )
