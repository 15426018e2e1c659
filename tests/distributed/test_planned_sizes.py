"""The plan's sizes against what is really there: parameters, weights, gradients, optimizer state
and saved activations of every rank.
"""

import dataclasses
import os
import tempfile
from pathlib import Path

import pytest
import torch

from megatron_slm.config.load import from_mapping
from megatron_slm.planning.hardware import find_gpu
from megatron_slm.planning.head import head_products
from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import layer_bytes, rank_memory, state_bytes
from megatron_slm.planning.parameters import model_parameters, stage_parameters
from megatron_slm.planning.result import checkpoint_bytes
from megatron_slm.planning.work import forward_flops
from megatron_slm.testing.saved_activations import SavedActivations
from megatron_slm.testing.spawn import parallel_config, run_layouts_on_cpu
from tests.known_models import GPT_2, NEOX, OLMO_2

MODEL = dict(
    layers=4,
    hidden_size=128,
    ffn_hidden_size=352,
    attention_heads=4,
    query_groups=2,
    vocabulary_size=500,
    pad_vocabulary_to_multiple_of=128,
)
ONE_KEY_HEAD_EACH = dict(query_groups=0)
CASES = {
    "llama, bf16": dict(model=MODEL, device=dict(precision="bf16")),
    "tied, qkv bias, fp32, full": dict(
        model=MODEL | dict(tied_embeddings=True, qkv_bias=True, recompute="full"),
        device=dict(precision="fp32"),
    ),
    "qk norm, wide heads, selective": dict(
        model=MODEL | dict(qk_norm=True, head_size=48, recompute="selective"),
        device=dict(precision="bf16"),
    ),
    "experts": dict(
        model=MODEL | dict(experts=4, load_balancing_coefficient=0.0), device=dict(precision="bf16")
    ),
    "windows": dict(model=MODEL | dict(attention_window_tokens=16), device=dict(precision="bf16")),
    "norms on outputs and over all heads, bf16": dict(
        model=MODEL | OLMO_2,
        device=dict(precision="bf16"),
    ),
    "norms in both places, fp32": dict(
        model=MODEL | dict(norm_placement="both", zero_centered_norms=True, embedding_scale=8.0),
        device=dict(precision="fp32"),
    ),
    "one key head each, fp32": dict(model=MODEL | ONE_KEY_HEAD_EACH, device=dict(precision="fp32")),
    "neox, bf16": dict(model=MODEL | NEOX | ONE_KEY_HEAD_EACH, device=dict(precision="bf16")),
    "gpt-2, fp32": dict(
        model=MODEL | GPT_2 | ONE_KEY_HEAD_EACH | dict(learned_positions=96),
        device=dict(precision="fp32"),
    ),
    "gelu with a gate, bias of one part": dict(
        model=MODEL | dict(activation="gelu", feed_forward_bias=True, normalization="layernorm"),
        device=dict(precision="bf16"),
    ),
}
LAYOUTS = {
    "one": {},
    "data 2, expert 2, distributed optimizer": dict(dp=2, ep=2),
    "pipeline 2 x 2": dict(pp=2, vpp=2),
    "tensor 2, sequence, pipeline 2": dict(tp=2, pp=2, sequence_parallel=True),
}
if os.environ.get("SLM_ALL_LAYOUTS"):
    LAYOUTS |= {
        "tensor 2, sequence": dict(tp=2, sequence_parallel=True),
        "pipeline 2": dict(pp=2),
        "pipeline 4": dict(pp=4),
        "tensor 2, sequence, data 2, expert 4, whole experts": dict(
            tp=2, dp=2, ep=4, etp=1, sequence_parallel=True
        ),
        "tensor 2, sequence, pipeline 2 x 2": dict(tp=2, pp=2, vpp=2, sequence_parallel=True),
    }
MICRO_BATCHES = 4
ACTIVATION_TOLERANCE = 0.05
"""docs/scale.md states it."""


def configuration(case: str, layout: dict):
    values = CASES[case] | dict(
        parallel=dataclasses.asdict(parallel_config(layout))
        | dict(distributed_optimizer=layout.get("dp", 1) > 1),
        data=dict(
            sequence_length=64,
            micro_batch_size=2,
            global_batch_size=2 * MICRO_BATCHES * layout.get("dp", 1),
        ),
    )
    config, problems = from_mapping(values)
    assert not problems
    return config


def measure(groups, name: str) -> dict:
    """Per case: this rank's parameters, bytes of weights, gradients and optimizer, and the peak of
    saved activations in one real step.
    """
    layout = LAYOUTS[name]
    found = {case: _measure_case(configuration(case, layout), groups) for case in CASES}
    if groups.world_size == 1:
        for case in CASES:
            found[case]["flops"] = _count_flops(configuration(case, layout), groups)
    return found


def _measure_case(config, groups) -> dict:
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel

    models = wrap_data_parallel(build_model(config, config.model.vocabulary_size, groups), config)
    parameters = [parameter for model in models for parameter in model.parameters()]
    names = [name for model in models for name, _ in model.named_parameters()]
    optimizer = build_optimizer(models, config)
    with SavedActivations(parameters) as saved:
        _forward_backward(models, groups, MICRO_BATCHES, trained_tokens=64)
    optimizer.step()
    disk = _checkpoint_bytes(models, optimizer, groups)
    gradients = [parameter.main_grad for parameter in parameters]
    return dict(
        parameters=sum(parameter.numel() for parameter in parameters),
        weights=bytes_of(parameters),
        gradients=bytes_of(gradients),
        optimizer=optimizer_bytes(optimizer, parameters),
        activations=saved.peak_bytes,
        disk=disk,
        tensors=names,
    )


def bytes_of(tensors) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _forward_backward(models: list, groups, micro_batches: int, trained_tokens: int) -> None:
    """Micro-batches of 2 x 64 tokens, of which the first `trained_tokens` of each sequence have a
    gradient.
    """
    from megatron_slm.data.batch import Batch
    from megatron_slm.model.forward_backward import forward_backward

    tokens_BS = torch.arange(128).view(2, 64)
    batches = [
        Batch(
            tokens_BS,
            tokens_BS,
            torch.ones(2, 64),
            tokens_BS % 64,
            tokens_BS,
            torch.zeros(2, dtype=torch.int64),
        )
        for _ in range(micro_batches)
    ]

    def loss(index, batch, output):
        return (
            output.loss_BS[:, :trained_tokens].sum(),
            torch.tensor(2.0 * trained_tokens, dtype=torch.float64),
            {},
        )

    for model in models:
        model.zero_grad_buffer()
    forward_backward(models, batches, loss, groups)


def _checkpoint_bytes(models: list, optimizer, groups) -> int | None:
    """The size of a real checkpoint's tensor files, in the one layout where a test needs no shared
    folder.
    """
    from megatron_slm.checkpoint.folder import CheckpointInfo
    from megatron_slm.checkpoint.store import CheckpointStore

    if groups.world_size > 1:
        return None
    with tempfile.TemporaryDirectory() as folder:
        CheckpointStore(folder, groups).save(
            models, optimizer, CheckpointInfo({}, 64, {}, 1, 128), {"layout": {}}
        )
        return sum(path.stat().st_size for path in Path(folder).rglob("*.distcp"))


def _count_flops(config, groups) -> int:
    """Counted operations of one micro-batch's forward and backward, half of its tokens trained.
    Attention as plain products, which are counted.
    """
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import wrap_data_parallel

    models = wrap_data_parallel(build_model(config, config.model.vocabulary_size, groups), config)
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        _forward_backward(models, groups, 1, trained_tokens=32)
    return counter.get_total_flops()


def optimizer_bytes(optimizer, parameters) -> int:
    """Moments, and main weights that have memory of their own."""
    own = {parameter.untyped_storage().data_ptr() for parameter in parameters}
    total = 0
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        for group in part.optimizer.param_groups:
            total += sum(
                main.numel() * main.element_size()
                for main in group["params"]
                if main.untyped_storage().data_ptr() not in own
            )
        for state in part.optimizer.state.values():
            total += sum(
                state[name].numel() * state[name].element_size()
                for name in ("exp_avg", "exp_avg_sq")
            )
    return total


@pytest.fixture(scope="module")
def measured() -> dict:
    return run_layouts_on_cpu(measure, LAYOUTS, side_by_side=True)


def planned(case: str, layout: dict) -> Job:
    config = configuration(case, layout)
    ranks = layout.get("tp", 1) * layout.get("pp", 1) * layout.get("cp", 1) * layout.get("dp", 1)
    return Job(
        config, config.model.vocabulary_size, find_gpu("H100"), gpus_per_node=ranks, fused=False
    )


def stage_of(rank: int, layout: dict) -> int:
    """Pipeline ranks are outermost in megatron-core's order."""
    return rank // (layout.get("tp", 1) * layout.get("cp", 1) * layout.get("dp", 1))


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_parameters_and_state_are_exact(measured, layout, case):
    job = planned(case, LAYOUTS[layout])
    spread = LAYOUTS[layout].get("dp", 1) > 1
    for rank, values in enumerate(measured[layout]):
        found = values[case]
        stage = stage_of(rank, LAYOUTS[layout])
        weights, gradients, optimizer = state_bytes(job, stage)
        assert found["parameters"] == stage_parameters(job, stage).total
        assert (found["weights"], found["gradients"]) == (weights, gradients)
        assert found["optimizer"] == (pytest.approx(optimizer, rel=0.1) if spread else optimizer)
    if spread:
        # megatron-core cuts its buffers into equal parts, padding and all: the ranks' parts
        # differ, their sum does not.
        ranks = measured[layout]
        assert sum(values[case]["optimizer"] for values in ranks) == optimizer * len(ranks)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_activations_in_flight(measured, layout, case):
    """Of experts on several ranks the mean over the ranks: this model's router is not trained, and
    does not spread its tokens evenly.
    """
    job = planned(case, LAYOUTS[layout])
    if case == "experts" and LAYOUTS[layout].get("ep", 1) > 1:
        found = [values[case]["activations"] for values in measured[layout]]
        assert sum(found) / len(found) == pytest.approx(
            rank_memory(job, 0).activations, rel=ACTIVATION_TOLERANCE
        )
        return
    for rank, values in enumerate(measured[layout]):
        memory = rank_memory(job, stage_of(rank, LAYOUTS[layout]))
        again = layer_bytes(job, "none") if job.config.model.recompute == "full" else 0
        assert values[case]["activations"] == pytest.approx(
            memory.activations + again, rel=ACTIVATION_TOLERANCE
        ), f"rank {rank}"


def test_the_whole_model_is_the_sum_of_its_parts(measured):
    for case in CASES:
        whole = model_parameters(planned(case, {})).total
        assert measured["one"][0][case]["parameters"] == whole


@pytest.mark.parametrize("case", CASES)
def test_executed_flops_are_the_counted_ones(measured, case):
    """A causal mask hides half of attention's square, and plain products compute it; of a window
    they compute blocks, the first of 16 x 16 and three of 16 x 31.
    """
    job = planned(case, {})
    forward = forward_flops(job, job.config.model)
    seen, computed = 65 / 2, 64.0
    if job.config.model.attention_window_tokens:
        seen, computed = 16 - 16 * 15 / 2 / 64, (16 * 16 + 3 * 16 * 31) / 64
    core = forward.attention_core * computed / seen
    layers = forward.attention_projections + forward.feed_forward + core
    again = {"none": 0, "selective": core, "full": layers}[job.config.model.recompute]
    per_token = 3 * layers + again + forward.head * head_products("keep", 0.5)
    assert measured["one"][0][case]["flops"] == pytest.approx(128 * per_token, rel=1e-9)


@pytest.mark.parametrize("case", CASES)
def test_checkpoint_size(measured, case):
    tensors = checkpoint_bytes(planned(case, {}))
    headers = (
        4096 * 4 * len(measured["one"][0][case]["tensors"])
    )  # each weight is stored with two moments and, under bf16, its fp32 copy
    assert tensors <= measured["one"][0][case]["disk"] <= tensors + headers
