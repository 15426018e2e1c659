"""The device a process computes on: a CUDA GPU with NCCL, or this machine's CPU with gloo.

megatron-core 0.16.1 writes device="cuda" into its schedules, buffers and checkpoints. On a machine without CUDA,
`use_cpu()` answers those requests with the CPU, so that megatron-core runs unmodified: tensor, sequence, pipeline and
data parallelism, the distributed optimizer and distributed checkpoints, over gloo. It is a supported way to run, and
does nothing at all where CUDA is used.

Call `choose(kind)` once per process, before anything imports megatron.core.
"""

import importlib.metadata
import os
import sys
import warnings
from contextlib import nullcontext
from dataclasses import dataclass
from functools import wraps

import torch
from torch.utils._device import _device_constructors

from megatron_slm.config.schema import DeviceConfig

# Functions that make a tensor on the device they are told. Wrapping only these costs a Python call per new tensor;
# a TorchFunctionMode would cost one per operation.
_FACTORIES = (
    "empty",
    "zeros",
    "ones",
    "full",
    "tensor",
    "as_tensor",
    "arange",
    "rand",
    "randn",
    "randint",
    "randperm",
    "eye",
    "linspace",
    "empty_like",
    "zeros_like",
    "ones_like",
    "full_like",
    "rand_like",
    "randn_like",
)


@dataclass(frozen=True)
class Device:
    """What this process computes on: `torch_device` for tensors, `backend` for torch.distributed."""

    kind: str
    torch_device: torch.device
    backend: str


def choose(kind: str = "auto") -> Device:
    """Take the device for this process: "auto", "cpu" or "cuda" (ValueError when CUDA is asked for and absent).

    On CUDA the GPU is LOCAL_RANK's; torch.cuda.set_device is called here, so that NCCL and megatron-core use it.
    """
    _quiet_megatron()
    if kind not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device.kind is {kind!r}; it can be auto, cpu or cuda")
    has_cuda = torch.cuda.is_available() and not getattr(torch.cuda, "_answered_by_cpu", False)
    if kind == "cuda" and not has_cuda:
        raise ValueError(
            "device.kind is cuda, but torch sees no CUDA device here; use auto or cpu, or check the driver "
            f"and the torch build (torch {torch.__version__})"
        )
    if has_cuda and kind != "cpu":
        local_rank = int(os.environ.get("LOCAL_RANK", 0))
        if local_rank >= torch.cuda.device_count():
            raise ValueError(
                f"LOCAL_RANK is {local_rank}, but this machine has {torch.cuda.device_count()} GPUs; "
                "start at most one process per GPU"
            )
        torch.cuda.set_device(local_rank)
        return Device("cuda", torch.device("cuda", local_rank), "nccl")
    use_cpu()
    return Device("cpu", torch.device("cpu"), "gloo")


def use_cpu() -> None:
    """Answer megatron-core's requests for CUDA with the CPU, in this process, from now on. Idempotent."""
    if getattr(torch.cuda, "_answered_by_cpu", False):
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "device.use_cpu() must run before megatron.core is imported: megatron-core binds CUDA functions at import"
        )
    torch.cuda._answered_by_cpu = True
    cpu = torch.device("cpu")

    # device="cuda" and device=<int> in tensor factories: forward_backward_no_pipelining,
    # get_grad_norm_fp32, _ParamAndGradBuffer and others of megatron-core.
    # `with torch.device("meta")` knows the factories it redirects by identity and looks them up once: before they are wrapped,
    # or transformers' from_pretrained would build its rotary embeddings from uninitialised memory.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))
    # device=torch.cuda.current_device(): answering with the CPU device itself serves every such call.
    torch.cuda.current_device = lambda: cpu
    torch.cuda.set_device = lambda device: None
    # Checkpoint workers (PersistentAsyncCaller.async_loop) compute rank % device_count.
    torch.cuda.device_count = lambda: 1
    torch.cuda.synchronize = lambda device=None: None
    torch.cuda.empty_cache = lambda: None

    # Streams: MoEAlltoAllTokenDispatcher copies counts to the host on one. The CPU works in order.
    # A class, as CUDA's is: transformers writes `torch.cuda.Stream | None` into its signatures.
    only_stream = _CpuStream()
    torch.cuda.Stream = _CpuStream
    torch.cuda.current_stream = lambda device=None: only_stream
    torch.cuda.stream = lambda stream: nullcontext()

    # tensor.cuda(), module.cuda(), tensor.to("cuda"): setup_embeddings_and_output_layer of
    # LanguageModule, get_pos_emb_on_this_cp_rank, exchange_loaded_tensors_gather_rounds.
    torch.Tensor.cuda = lambda self, *args, **kwargs: self
    torch.nn.Module.cuda = lambda self, device=None: self
    torch.Tensor.to = _to_cpu(torch.Tensor.to)

    # Optimizers and clip_grad_by_total_norm_fp32 sort parameters by the *name* of their type.
    torch.Tensor.type = _cuda_type_name(torch.Tensor.type)

    # One random state, for CudaRNGStatesTracker too: CUDA's generator is the CPU's.
    torch.cuda.manual_seed = torch.default_generator.manual_seed
    torch.cuda.get_rng_state = lambda device=None: torch.get_rng_state()
    torch.cuda.set_rng_state = lambda state, device=None: torch.set_rng_state(state)
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = (
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = (
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    )
    # It turns the split sizes of the all-to-all into numpy only when it finds them on a GPU.
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    token_dispatcher.maybe_move_tensor_to_cpu = (
        lambda tensor, as_numpy=False, record_stream=False: tensor.numpy()
        if as_numpy and torch.is_tensor(tensor)
        else tensor
    )
    _answer_uneven_collectives()


def _answer_uneven_collectives() -> None:
    """Gather and reduce-scatter uneven pieces by an all-to-all: gloo knows equal ones only, and tokens are dealt to experts as they choose.

    Experts split over a tensor group need them.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    gather, scatter = mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim

    @wraps(gather)
    def gathered(input_, group, output_split_sizes=None, use_global_buffer=False):
        if output_split_sizes is None or group.size() == 1:
            return gather(input_, group, output_split_sizes, use_global_buffer)
        output = input_.new_empty(sum(output_split_sizes), *input_.shape[1:])
        torch.distributed.all_to_all_single(
            output,
            torch.cat([input_] * group.size()),
            output_split_sizes,
            [len(input_)] * group.size(),
            group=group,
        )
        return output

    @wraps(scatter)
    def scattered(input_, group, input_split_sizes=None, use_global_buffer=False):
        if input_split_sizes is None or group.size() == 1:
            return scatter(input_, group, input_split_sizes, use_global_buffer)
        own = input_split_sizes[group.rank()]
        parts = input_.new_empty(group.size() * own, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            parts, input_.contiguous(), [own] * group.size(), input_split_sizes, group=group
        )
        return parts.view(group.size(), own, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim, mappings._reduce_scatter_along_first_dim = gathered, scattered


class _CpuStream:
    """A stream of a CPU process, which is also its own event: whatever was asked for is already done."""

    def __init__(self, *args, **kwargs): ...
    def wait_stream(self, stream) -> None: ...
    def record_event(self, event=None):
        return self

    def synchronize(self) -> None: ...


def _quiet_megatron() -> None:
    """Drop megatron-core's import-time and deprecation warnings: dozens of lines per process, none of them for our users.

    What they say about missing accelerations, describe_acceleration() says once. Its `import wandb`, for nothing that is
    used here, is refused: it takes time, and makes temporary folders that stay after a kill (monitoring/wandb_loading.py).
    """
    sys.modules.setdefault("wandb", None)
    warnings.filterwarnings("ignore", category=UserWarning, module=r"megatron\.core")
    warnings.filterwarnings(
        "ignore", category=FutureWarning, module=r"megatron\.core|torch\.distributed"
    )


def _is_cuda(device) -> bool:
    """Whether a device argument means a GPU: "cuda", "cuda:1", torch.device("cuda"), or a bare index."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _on_cpu(factory):
    @wraps(factory)
    def on_cpu(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        # Pinning needs CUDA; context parallel RoPE (get_pos_emb_on_this_cp_rank) asks for it.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _to_cpu(to):
    @wraps(to)
    def to_cpu(self, *args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return to(self, *args, **kwargs)

    return to_cpu


def _cuda_type_name(type_of):
    @wraps(type_of)
    def cuda_type_name(self, *args, **kwargs):
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    return cuda_type_name


def set_threads(threads_per_process: int = 0) -> int:
    """CPU threads of this process: as given, else (0) this machine's cores shared by its processes; returns the number.

    More threads than cores is worse than slow: OpenMP's waiting threads spin.
    """
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    threads = threads_per_process or max(1, len(os.sched_getaffinity(0)) // processes)
    torch.set_num_threads(threads)
    return threads


def has_transformer_engine() -> bool:
    """Whether Transformer Engine's torch layers can be imported."""
    try:
        import transformer_engine.pytorch  # noqa: F401
    except Exception:  # a broken build raises anything, from ImportError to OSError
        return False
    return True


def apex_state() -> str:
    """ "nvidia" (NVIDIA's apex with its CUDA extensions), "nvidia_python" (built without them), "foreign", or "absent".

    `apex` on PyPI is an unrelated project (a Pyramid toolkit); NVIDIA's is only built from its source, see the Dockerfile.
    """
    import importlib.util

    if importlib.util.find_spec("apex") is None:
        return "absent"
    if (
        importlib.util.find_spec("apex.optimizers") is None
        and importlib.util.find_spec("apex.multi_tensor_apply") is None
    ):
        return "foreign"
    return "nvidia" if importlib.util.find_spec("amp_C") is not None else "nvidia_python"


def fp8_problem(layers: str, recipe: str) -> str:
    """Why fp8 products cannot be had here; "" when they can."""
    if layers != "transformer_engine":
        return "the layers are torch-native (fp8 needs Transformer Engine on a GPU)"
    capability, needed = (
        torch.cuda.get_device_capability(),
        (10, 0) if recipe == "mxfp8" else (8, 9),
    )
    if capability < needed:
        return f"this GPU has compute capability {'.'.join(map(str, capability))}, and {recipe} fp8 needs {'.'.join(map(str, needed))}"
    return ""


def apex_rms_norm():
    """apex's fused RMSNorm as function(input, weight, normalized_shape, epsilon), or None where its CUDA extension is not built."""
    if (
        torch.cuda.is_available()
        and apex_state() == "nvidia"
        and has_module("fused_layer_norm_cuda")
    ):
        from apex.normalization.fused_layer_norm import fused_rms_norm_affine

        return fused_rms_norm_affine
    return None


def describe_acceleration(
    device: Device, layers: str, asked: DeviceConfig, isolated_documents: bool = False
) -> list[tuple[str, str, str]]:
    """Rows (feature, state, why) of the start table: which accelerations are on, and why the others are not."""
    on_gpu = device.kind == "cuda"
    engine, apex = has_transformer_engine(), apex_state()
    apex_words = {
        "absent": "not installed",
        "nvidia": "NVIDIA apex with CUDA extensions",
        "nvidia_python": "NVIDIA apex WITHOUT its CUDA extensions: rebuild it as the Dockerfile does",
        "foreign": f"the 'apex' installed here ({_version('apex')}) is an unrelated PyPI project: pip uninstall apex, and build NVIDIA's as the Dockerfile does",
    }
    rows = [("device", device.kind, f"{device.backend} collectives")]
    if layers == "transformer_engine":
        rows.append(("layers", "Transformer Engine", ""))
    else:
        why = (
            "device is the CPU"
            if not on_gpu
            else "not installed"
            if not engine
            else "its attention takes no mask of isolated documents"
            if isolated_documents
            else "device.layers asks for torch"
        )
        rows.append(("layers", "torch-native", f"Transformer Engine: {why}"))
    if layers == "transformer_engine":
        rows.append(("fused norm", "Transformer Engine", ""))
    elif on_gpu and apex == "nvidia" and has_module("fused_layer_norm_cuda"):
        rows.append(("fused norm", "apex", ""))
    else:
        rows.append(
            (
                "fused norm",
                "off",
                "no CUDA"
                if not on_gpu
                else "apex: "
                + (
                    apex_words[apex] if apex != "nvidia" else "built without --cuda_ext layer norms"
                ),
            )
        )
    fused = (
        "Transformer Engine" if engine and on_gpu else "apex" if apex == "nvidia" and on_gpu else ""
    )
    rows.append(
        (
            "optimizer",
            f"AdamW, {fused or 'torch'}",
            ""
            if fused
            else "no CUDA"
            if not on_gpu
            else "neither Transformer Engine nor NVIDIA apex is installed",
        )
    )
    fusion = on_gpu and has_module("fused_weight_gradient_mlp_cuda")
    rows.append(
        (
            "gradient-accumulation fusion",
            "on" if fusion else "off",
            "" if fusion else "no CUDA" if not on_gpu else "apex: " + apex_words[apex],
        )
    )
    rows.append(
        ("fp8", f"{asked.fp8}, {asked.fp8_recipe} scaling", "")
        if asked.fp8 != "none"
        else (
            "fp8",
            "off",
            "no CUDA"
            if not on_gpu
            else "it needs Transformer Engine layers"
            if layers == "torch"
            else "device.fp8 is none",
        )
    )
    rows.append(("apex", apex.replace("_", " "), apex_words[apex]))
    return rows


def has_module(name: str) -> bool:
    """Whether a module can be found, without importing it."""
    import importlib.util

    return importlib.util.find_spec(name) is not None


def _version(package: str) -> str:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return "unknown version"
