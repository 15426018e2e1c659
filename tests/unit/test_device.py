"""The choice of a device, and what is said of accelerations.

The CPU stand-ins run in an interpreter of their own: they replace parts of torch for the whole
process.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.accelerations import apex_state, fp8_problem
from megatron_slm.config.schema import DeviceConfig, ModelConfig
from megatron_slm.device import Device, choose_device
from megatron_slm.training.acceleration_rows import acceleration_rows

ROOT = Path(__file__).resolve().parents[2]


def run(code: str, **environment) -> str:
    """What `code` prints in a fresh interpreter that sees no GPU; a failure shows its traceback."""
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "CUDA_VISIBLE_DEVICES": "",
            "OMP_NUM_THREADS": "1",
            **environment,
        },
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


STAND_INS = """
import sys, torch
before, to = torch.zeros, torch.Tensor.to
import megatron_slm.device, megatron_slm.parallel
from megatron_slm.cpu_standins import use_cpu
assert torch.zeros is before and torch.Tensor.to is to, "importing the room changes nothing"
assert "megatron" not in sys.modules
from megatron_slm.device import choose_device
use_cpu()
after = torch.zeros
assert after is not before
use_cpu()
assert torch.zeros is after, "use_cpu wraps what it has wrapped already"

x = torch.zeros(3, device="cuda")
assert x.device.type == "cpu" and torch.equal(x, torch.zeros(3))
for made in (
    torch.empty(2, device="cuda:0"),
    torch.tensor([1.0], device=torch.device("cuda", 0)),
    torch.arange(4, device=0),
    torch.ones_like(x, device="cuda"),
    torch.full((2,), 7.0, device=torch.cuda.current_device()),
    torch.rand(2, pin_memory=True),
    x.cuda(),
    x.to("cuda"),
    x.to(device="cuda:0", dtype=torch.float64),
    torch.nn.Linear(2, 2).cuda().weight,
):
    assert made.device.type == "cpu"
assert x.to(torch.float64).dtype == torch.float64, "only devices are answered, dtypes pass"
assert x.to("cpu", torch.int32).dtype == torch.int32
assert torch.zeros(2, device="meta").is_meta, "other devices pass"
with torch.device("meta"):  # it reaches wrapped factories: transformers builds models under it
    assert torch.zeros(2).is_meta and torch.arange(3).is_meta
assert x.bfloat16().type() == "torch.cuda.BFloat16Tensor"
assert x.type() == "torch.cuda.FloatTensor"
assert x.type(torch.int64).dtype == torch.int64
assert x.type("torch.DoubleTensor").dtype == torch.float64
torch.cuda.manual_seed(5); a = torch.rand(3)
torch.manual_seed(5); b = torch.rand(3)
assert torch.equal(a, b), "one random state"
state = torch.cuda.get_rng_state(); c = torch.rand(3); torch.cuda.set_rng_state(state)
assert torch.equal(c, torch.rand(3))
stream = torch.cuda.Stream()
with torch.cuda.stream(stream):
    stream.wait_stream(torch.cuda.current_stream())
    stream.record_event().synchronize()
assert isinstance(stream, torch.cuda.Stream)
assert torch.cuda.Stream | None, "a class: transformers writes it into signatures"
torch.cuda.synchronize(); torch.cuda.set_device(0); torch.cuda.empty_cache()
assert torch.cuda.device_count() == 1

# megatron-core's own tracker draws from that state: forking gives other numbers, leaving brings the
# old ones back.
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
tracker = get_cuda_rng_tracker()
torch.manual_seed(1); plain = torch.rand(2)
tracker.add("model-parallel-rng", 7)
torch.manual_seed(1)
with tracker.fork("model-parallel-rng"):
    inside = torch.rand(2)
assert not torch.equal(inside, plain) and torch.equal(torch.rand(2), plain)
chosen = choose_device("auto")
described = (chosen.kind, chosen.backend, chosen.torch_device.type)
assert described == ("cpu", "gloo", "cpu"), "a stand-in is not a GPU"
try:
    choose_device("cuda")
except ValueError as error:
    assert "use auto or cpu" in str(error)
else:
    raise AssertionError("device.kind cuda must be refused")
print("good")
"""


def test_stand_ins():
    assert "good" in run(STAND_INS)


def test_stand_ins_are_refused_once_megatron_core_is_there():
    code = (
        "import megatron.core\nfrom megatron_slm import cpu_standins\n"
        "try:\n    cpu_standins.use_cpu()\nexcept RuntimeError as error:\n    print(error)\n"
    )
    assert "must run before megatron.core is imported" in run(code)


def test_an_unknown_kind_names_the_known_ones():
    with pytest.raises(ValueError, match="'tpu'; it can be auto, cpu or cuda"):
        choose_device("tpu")


@pytest.fixture
def shared_gpu_job(monkeypatch):
    """A job whose processes ask to share the machine's GPUs; returns the device it gets."""

    def choose(gpus: int, *, processes: int, world: int, local_rank: int = 0, kind: str = "auto"):
        import torch

        monkeypatch.setenv("SLM_SHARED_GPU", "1")
        monkeypatch.setenv("LOCAL_WORLD_SIZE", str(processes))
        monkeypatch.setenv("WORLD_SIZE", str(world))
        monkeypatch.setenv("LOCAL_RANK", str(local_rank))
        monkeypatch.setattr(torch.cuda, "is_available", lambda: gpus > 0)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: gpus)
        monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
        return choose_device(kind)

    return choose


def test_processes_share_gpus_over_gloo_where_a_developer_asks_for_it(shared_gpu_job):
    device = shared_gpu_job(2, processes=4, world=4, local_rank=3)
    assert (device.kind, device.torch_device.index, device.backend) == ("cuda", 1, "staged_gloo")


@pytest.mark.parametrize(
    "gpus, job, said",
    [
        (0, dict(processes=2, world=2), "torch sees no CUDA device to share"),
        (1, dict(processes=2, world=2, kind="cpu"), "torch sees no CUDA device to share"),
        (8, dict(processes=8, world=8), "8 processes have 8 GPUs, one each"),
        (1, dict(processes=1, world=1), "1 processes have 1 GPUs, one each"),
        (1, dict(processes=2, world=4), "in a job of 4 processes, 2 of them on this machine"),
    ],
)
def test_a_normal_run_that_asks_to_share_gpus_is_refused(shared_gpu_job, gpus, job, said):
    with pytest.raises(ValueError, match=said):
        shared_gpu_job(gpus, **job)


def test_another_value_of_the_switch_is_refused(monkeypatch):
    monkeypatch.setenv("SLM_SHARED_GPU", "yes")
    with pytest.raises(ValueError, match="SLM_SHARED_GPU: got 'yes'; expected 1"):
        choose_device("auto")


def test_more_processes_than_gpus_are_refused_without_the_switch(monkeypatch):
    import torch

    monkeypatch.delenv("SLM_SHARED_GPU", raising=False)
    monkeypatch.setenv("LOCAL_RANK", "1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    with pytest.raises(ValueError, match="at most one process per GPU"):
        choose_device("cuda")


@pytest.fixture
def package(tmp_path, monkeypatch):
    """Make modules that can be found under `tmp_path`, in front of whatever is installed."""
    monkeypatch.syspath_prepend(tmp_path)
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        monkeypatch.delitem(sys.modules, name)

    def make(*modules):
        for module in modules:
            path = tmp_path.joinpath(*module.split("."))
            path.mkdir(parents=True, exist_ok=True)
            (path / "__init__.py").write_text("")

    yield make
    for name in [name for name in sys.modules if name.split(".")[0] in ("apex", "amp_C")]:
        del sys.modules[name]


@pytest.mark.parametrize(
    "modules, state",
    [
        (["apex"], "foreign"),  # the PyPI project: an `apex` without NVIDIA's parts
        (["apex", "apex.lib", "apex.views"], "foreign"),
        (["apex", "apex.optimizers"], "nvidia_python"),
        (["apex", "apex.multi_tensor_apply"], "nvidia_python"),
        (["apex", "apex.optimizers", "amp_C"], "nvidia"),
    ],
)
def test_apex_state(package, modules, state):
    package(*modules)
    assert apex_state() == state


def test_apex_is_absent(monkeypatch):
    import importlib.util

    find = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util,
        "find_spec",
        lambda name, *rest: None if name == "apex" else find(name, *rest),
    )
    assert apex_state() == "absent"


def test_the_start_table_says_why_an_acceleration_is_off(package):
    import torch

    package("apex")
    rows = {
        feature: (state, why)
        for feature, state, why in acceleration_rows(
            Device("cpu", torch.device("cpu"), "gloo"), "torch", DeviceConfig()
        )
    }
    assert rows["device"] == ("cpu", "gloo collectives")
    assert rows["optimizer"] == (
        "AdamW, torch",
        "no CUDA",
    )
    assert "the CPU" in rows["layers"][1]
    assert rows["fused norm"] == rows["fp8"] == ("off", "no CUDA")
    assert rows["apex"][0] == "foreign"
    assert "unrelated PyPI project" in rows["apex"][1]
    assert "Dockerfile" in rows["apex"][1]
    on_gpu = {
        feature: (state, why)
        for feature, state, why in acceleration_rows(
            Device("cuda", torch.device("cuda"), "nccl"), "torch", DeviceConfig()
        )
    }
    assert on_gpu["fused norm"] == on_gpu["fused rotary embedding"] == ("Triton", "")
    assert on_gpu["fp8"] == ("off", "it needs Transformer Engine layers")
    assert on_gpu["gradient-accumulation fusion"][0] == "head only"
    assert "pip uninstall apex" in on_gpu["gradient-accumulation fusion"][1]


@pytest.mark.parametrize(
    "settings, experts, norm, rotary, swiglu",
    [
        ({}, False, "Triton", "Triton", "Triton"),
        ({}, True, "Triton", "Triton", "torch.compile"),
        ({"fused_layers": "none"}, False, "off", "off", "torch.compile"),
    ],
)
def test_the_start_table_says_which_passes_are_triton(
    package, settings, experts, norm, rotary, swiglu
):
    import torch

    package("apex")
    rows = {
        feature: (state, why)
        for feature, state, why in acceleration_rows(
            Device("cuda", torch.device("cuda"), "nccl"),
            "torch",
            DeviceConfig(**settings),
            model=ModelConfig(experts=4 if experts else 0),
        )
    }
    for feature, state in (
        ("fused norm", norm),
        ("fused rotary embedding", rotary),
        ("fused SwiGLU", swiglu),
    ):
        assert rows[feature][0] == state, feature
        assert bool(rows[feature][1]) == (state != "Triton"), feature
    if settings:
        assert "pip uninstall apex" in rows["fused norm"][1]
        assert "device.fused_layers is none" in rows["fused norm"][1]


def test_the_start_table_says_what_is_on(package):
    import torch

    package(
        "apex",
        "apex.optimizers",
        "amp_C",
        "fused_layer_norm_cuda",
        "fused_weight_gradient_mlp_cuda",
    )
    cuda = Device("cuda", torch.device("cuda"), "nccl")
    native = {
        feature: state
        for feature, state, _ in acceleration_rows(
            cuda, "torch", DeviceConfig(), engine_lacks="its layers lack something"
        )
    }
    assert (native["fused norm"], native["optimizer"], native["gradient-accumulation fusion"]) == (
        "apex",
        "AdamW, apex",
        "apex",
    )
    assert native["fused rotary embedding"] == native["fused SwiGLU"] == "Triton"
    engine = {
        feature: state
        for feature, state, _ in acceleration_rows(
            cuda, "transformer_engine", DeviceConfig(fp8="hybrid")
        )
    }
    assert (engine["fused norm"], engine["layers"], engine["fp8"]) == (
        "Transformer Engine",
        "Transformer Engine",
        "hybrid, tensorwise scaling",
    )


@pytest.mark.parametrize(
    "capability, recipe, problem",
    [
        ((8, 0), "tensorwise", "capability 8.0"),
        ((8, 9), "delayed", ""),
        ((9, 0), "mxfp8", "needs 10.0"),
    ],
)
def test_fp8_is_refused_where_the_hardware_has_none(monkeypatch, capability, recipe, problem):
    import torch

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert (
        fp8_problem("transformer_engine", recipe) == ""
        if not problem
        else problem in fp8_problem("transformer_engine", recipe)
    )
    assert "torch-native" in fp8_problem("torch", recipe)


@pytest.mark.parametrize(
    "operation, experts, swiglu",
    [
        (object, False, ("Transformer Engine", "")),
        (object, True, ("torch.compile", "does not weigh")),
        (None, False, ("torch.compile", "from version 1.13 on")),
    ],
)
def test_the_start_table_says_which_passes_transformer_engine_makes(
    monkeypatch, operation, experts, swiglu
):
    import torch

    from megatron_slm.training import acceleration_rows as table

    monkeypatch.setattr(table, "has_transformer_engine", lambda: True)
    monkeypatch.setattr(table, "transformer_engine_swiglu", lambda: operation)
    rows = {
        feature: (state, why)
        for feature, state, why in acceleration_rows(
            Device("cuda", torch.device("cuda"), "nccl"),
            "transformer_engine",
            DeviceConfig(),
            model=ModelConfig(experts=4 if experts else 0),
        )
    }
    assert rows["fused SwiGLU"][0] == swiglu[0]
    assert swiglu[1] in rows["fused SwiGLU"][1]
    for feature in ("fused norm", "fused rotary embedding", "gradient-accumulation fusion"):
        assert rows[feature] == ("Transformer Engine", ""), feature
