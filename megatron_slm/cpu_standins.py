"""Stand-ins that let megatron-core run unmodified on a machine without CUDA.

megatron-core writes device="cuda" into its schedules, buffers and checkpoints. `use_cpu()`
redirects them to the CPU: tensor, sequence, pipeline and data parallelism, the distributed
optimizer and distributed checkpoints then run over gloo. It is a supported way to run, and nothing
of it is used where CUDA is.
"""

import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import wraps
from typing import Any

import torch
from torch.utils._device import _device_constructors

# Functions that make a tensor on the device given to them. Wrapping only these costs a Python call
# per new tensor; a TorchFunctionMode would cost one per operation.
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


def cpu_answers_for_cuda() -> bool:
    """Whether the stand-ins are in place, so that torch.cuda describes the CPU."""
    return getattr(torch.cuda, "_answered_by_cpu", False)


def use_cpu() -> None:
    """Redirect megatron-core's uses of CUDA to the CPU, in this process, from now on.

    A second call does nothing.
    """
    if cpu_answers_for_cuda():
        return
    if "megatron.core" in sys.modules:
        raise RuntimeError(
            "cpu_standins.use_cpu() must run before megatron.core is imported: megatron-core binds "
            "CUDA functions at import"
        )
    _replace(torch.cuda, _answered_by_cpu=True)
    _answer_factories()
    _answer_device_queries()
    _answer_streams()
    _answer_moves()
    _answer_random_state()
    _answer_split_sizes()
    _answer_uneven_collectives()
    _answer_compilation()


def _replace(owner: object, **replacements: object) -> None:
    for name, replacement in replacements.items():
        setattr(owner, name, replacement)


def _answer_factories() -> None:
    """device="cuda" and device=<int> in tensor factories.

    forward_backward_no_pipelining, get_grad_norm_fp32, _ParamAndGradBuffer and others of
    megatron-core ask for them.
    """
    # `with torch.device("meta")` knows the factories it redirects by identity and looks them up
    # once: before they are wrapped, or transformers' from_pretrained would build its rotary
    # embeddings from uninitialised memory.
    _device_constructors()
    for name in _FACTORIES:
        setattr(torch, name, _on_cpu(getattr(torch, name)))


def _answer_device_queries() -> None:
    """Questions about devices; "the CPU" serves device=torch.cuda.current_device().

    Checkpoint workers (PersistentAsyncCaller.async_loop) compute rank % device_count.
    """
    cpu = torch.device("cpu")
    _replace(
        torch.cuda,
        current_device=lambda: cpu,
        set_device=lambda device: None,
        device_count=lambda: 1,
        synchronize=lambda device=None: None,
        empty_cache=lambda: None,
    )


def _answer_streams() -> None:
    """Streams: MoEAlltoAllTokenDispatcher copies counts to the host on one.

    Stream is a class, as CUDA's is: transformers writes `torch.cuda.Stream | None` into its
    signatures.
    """
    only_stream = _CpuStream()
    _replace(
        torch.cuda,
        Stream=_CpuStream,
        current_stream=lambda device=None: only_stream,
        stream=lambda stream: nullcontext(),
    )


def _answer_moves() -> None:
    """tensor.cuda(), module.cuda(), tensor.to("cuda"), and the name of a tensor's type.

    LanguageModule.setup_embeddings_and_output_layer, get_pos_emb_on_this_cp_rank and
    exchange_loaded_tensors_gather_rounds move tensors. Optimizers and clip_grad_by_total_norm_fp32
    sort parameters by the name of their type.
    """
    _replace(
        torch.Tensor,
        cuda=lambda self, *args, **kwargs: self,
        to=_to_cpu(torch.Tensor.to),
        type=_cuda_type_name(torch.Tensor.type),
    )
    _replace(torch.nn.Module, cuda=lambda self, device=None: self)


def _answer_random_state() -> None:
    """One random state, for CudaRNGStatesTracker too: CUDA's generator is the CPU's."""
    _replace(
        torch.cuda,
        manual_seed=torch.default_generator.manual_seed,
        get_rng_state=lambda device=None: torch.get_rng_state(),
        set_rng_state=lambda state, device=None: torch.set_rng_state(state),
    )
    # Imported only now: megatron-core binds CUDA functions at import.
    import megatron.core.tensor_parallel.random as megatron_random

    megatron_random._get_cuda_rng_state = (
        lambda device="cuda", clone=False, graph_safe=False: torch.get_rng_state()
    )
    megatron_random._set_cuda_rng_state = (
        lambda state, device=-1, graph_safe=False: torch.set_rng_state(state)
    )


def _answer_split_sizes() -> None:
    """Split sizes of the experts' all-to-all as numpy: the original converts GPU tensors only."""
    import megatron.core.transformer.moe.token_dispatcher as token_dispatcher

    def to_cpu(tensor, as_numpy=False, record_stream=False):
        return tensor.numpy() if as_numpy and torch.is_tensor(tensor) else tensor

    token_dispatcher.maybe_move_tensor_to_cpu = to_cpu


def _answer_uneven_collectives() -> None:
    """Gather and reduce-scatter unequal pieces by an all-to-all: gloo knows equal ones only.

    Experts split over a tensor group need them, because each expert gets a number of tokens of its
    own.
    """
    import megatron.core.tensor_parallel.mappings as mappings

    gather = mappings._gather_along_first_dim
    scatter = mappings._reduce_scatter_along_first_dim

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
        own_size = input_split_sizes[group.rank()]
        parts = input_.new_empty(group.size() * own_size, *input_.shape[1:])
        torch.distributed.all_to_all_single(
            parts,
            input_.contiguous(),
            [own_size] * group.size(),
            input_split_sizes,
            group=group,
        )
        return parts.view(group.size(), own_size, *input_.shape[1:]).sum(0)

    mappings._gather_along_first_dim = gathered
    mappings._reduce_scatter_along_first_dim = scattered


def _answer_compilation() -> None:
    """torch.compile, which megatron-core calls while it is imported, for its fused functions.

    Each is compiled when it is first called, and not before. On the CPU none of them is, and
    loading the compiler takes a quarter of the start-up time of a process.
    """
    _replace(torch, compile=_compiling_at_first_call(torch.compile))


class _CpuStream:
    """A stream, and also its own event, that has nothing to do: CPU work is synchronous."""

    def __init__(self, *args, **kwargs): ...
    def wait_stream(self, stream) -> None: ...
    def record_event(self, event=None):
        return self

    def synchronize(self) -> None: ...


def _is_cuda(device: Any) -> bool:
    """Whether a device argument means a GPU: "cuda", "cuda:1", torch.device("cuda"), an index."""
    if isinstance(device, int) and not isinstance(device, bool):
        return True
    return isinstance(device, (str, torch.device)) and torch.device(device).type == "cuda"


def _on_cpu(factory: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(factory)
    def on_cpu(*args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        # Pinning needs CUDA; context parallel RoPE (get_pos_emb_on_this_cp_rank) uses it.
        kwargs.pop("pin_memory", None)
        return factory(*args, **kwargs)

    return on_cpu


def _to_cpu(to: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(to)
    def to_cpu(self, *args, **kwargs):
        if _is_cuda(kwargs.get("device")):
            kwargs["device"] = "cpu"
        if args and _is_cuda(args[0]):
            args = ("cpu", *args[1:])
        return to(self, *args, **kwargs)

    return to_cpu


def _cuda_type_name(type_of: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(type_of)
    def cuda_type_name(self, *args, **kwargs):
        if args or kwargs:
            return type_of(self, *args, **kwargs)
        return type_of(self).replace("torch.", "torch.cuda.", 1)

    return cuda_type_name


def _compiling_at_first_call(compile_now: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(compile_now)
    def compile_later(model=None, **options):
        if model is None:
            return lambda function: compile_later(function, **options)
        if isinstance(model, torch.nn.Module):
            return compile_now(model, **options)
        compiled: list[Callable[..., Any]] = []

        @wraps(model)
        def call(*args, **kwargs):
            if not compiled:
                compiled.append(compile_now(model, **options))
            return compiled[0](*args, **kwargs)

        return call

    return compile_later
