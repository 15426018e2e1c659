"""The rows of the start table about the layout: how the model and the batch are spread."""

from megatron_slm.config.overlap import decide_overlap
from megatron_slm.config.schema import Config, ParallelConfig
from megatron_slm.training.acceleration_rows import Row

RECOMPUTED = {"selective": "attention cores", "full": "every layer"}


def layout_rows(config: Config, dp_size: int, *, on_gpu: bool) -> list[Row]:
    """How the model and the batch are spread, and what of it is hidden or recomputed."""
    parallel = config.parallel
    return [
        _size_row(parallel, "tensor"),
        _switch_row(
            parallel,
            "sequence parallel",
            "sequence",
            why_off="parallel.tensor is 1" if parallel.tensor == 1 else "",
        ),
        _size_row(parallel, "pipeline"),
        _virtual_pipeline_row(parallel),
        _size_row(parallel, "context"),
        _data_row(parallel, dp_size),
        *_expert_rows(config),
        _switch_row(parallel, "distributed optimizer", "distributed_optimizer"),
        *_overlap_rows(config, dp_size, on_gpu),
        _accumulation_row(config, dp_size),
        _recomputation_row(config.model.recompute),
    ]


def _size_row(parallel: ParallelConfig, name: str) -> Row:
    value = getattr(parallel, name)
    feature = f"{name.replace('_', ' ')} parallel"
    if value > 1:
        return feature, str(value), ""
    return feature, "off", f"parallel.{name} is 1"


def _switch_row(parallel: ParallelConfig, feature: str, name: str, why_off: str = "") -> Row:
    if getattr(parallel, name):
        return feature, "on", ""
    return feature, "off", why_off or f"parallel.{name} is false"


def _virtual_pipeline_row(parallel: ParallelConfig) -> Row:
    if parallel.pipeline > 1:
        return _size_row(parallel, "virtual_pipeline")
    return "virtual pipeline parallel", "off", "parallel.pipeline is 1"


def _data_row(parallel: ParallelConfig, dp_size: int) -> Row:
    if dp_size > 1:
        return "data parallel", str(dp_size), ""
    model_parallel_size = parallel.tensor * parallel.pipeline * parallel.context
    why = f"one copy of the model takes all processes, {model_parallel_size}"
    return "data parallel", "off", why


def _expert_rows(config: Config) -> list[Row]:
    if not config.model.experts:
        return []
    parallel = config.parallel
    tensor_size = parallel.expert_tensor or parallel.tensor
    return [
        _size_row(parallel, "expert"),
        ("experts, tensor parallel", str(tensor_size), ""),
    ]


def _overlap_rows(config: Config, dp_size: int, on_gpu: bool) -> list[Row]:
    """Gradients reduced during backward, and weights gathered during forward."""
    parallel = config.parallel
    ranks = dp_size * parallel.context
    overlap = decide_overlap(config, on_gpu=on_gpu, ranks=ranks)
    alone = "nothing to reduce over: data parallel x context parallel is 1"
    no_need = alone if ranks == 1 else "no CUDA"
    reduction = "gradient reduction overlapped"
    gather = "parameter gather overlapped"
    if not overlap.grad_reduce:
        asked = parallel.overlap_grad_reduce is False
        why = "parallel.overlap_grad_reduce is false" if asked else no_need
        rows = [(reduction, "off", why)]
    else:
        rows = [(reduction, "no effect", alone) if ranks == 1 else (reduction, "on", "")]
    if overlap.param_gather:
        return [*rows, (gather, "on", "")]
    for name in ("overlap_param_gather", "distributed_optimizer", "overlap_grad_reduce"):
        if getattr(parallel, name) is False:
            return [*rows, (gather, "off", f"parallel.{name} is false")]
    return [*rows, (gather, "off", no_need)]


def _accumulation_row(config: Config, dp_size: int) -> Row:
    size = config.data.micro_batch_size
    micro_batches = config.data.global_batch_size // (size * dp_size)
    return "gradient accumulation", f"{micro_batches} micro-batches of {size} sequences", ""


def _recomputation_row(recompute: str) -> Row:
    if recompute == "none":
        return "recomputation", "off", "model.recompute is none"
    return "recomputation", recompute, RECOMPUTED[recompute]
