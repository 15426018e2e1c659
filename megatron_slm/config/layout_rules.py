"""Rules between settings that every program checks: sizes, layout, what an engine can do."""

from collections.abc import Iterator

from megatron_slm.config.layer_engine import torch_only_settings
from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.config.sizes import model_parallel_size, sequence_pieces


def model_problems(config: Config, world_size: int) -> Iterator[str]:
    model, parallel = config.model, config.parallel
    if not model.head_size and model.hidden_size % model.attention_heads:
        yield (
            f"model.hidden_size: got {model.hidden_size}, which {model.attention_heads} attention "
            "heads do not divide; change model.attention_heads, or set model.head_size"
        )
    whole_heads = model.position_embedding == "rope" and model.rope_fraction == 1
    if whole_heads and (model.head_size or model.hidden_size // model.attention_heads) % 2:
        yield (
            "model.head_size: got "
            f"{model.head_size or model.hidden_size // model.attention_heads}; rotary embeddings "
            "need an even head size"
        )
    groups = model.query_groups or model.attention_heads
    if model.attention_heads % groups:
        yield (
            f"model.query_groups: got {groups}; it must divide model.attention_heads "
            f"({model.attention_heads})"
        )
    split_by_tensor = {"attention_heads": model.attention_heads, "query_groups": groups}
    if not model.experts:
        split_by_tensor["ffn_hidden_size"] = model.ffn_hidden_size
    for name, size in split_by_tensor.items():
        if size % parallel.tensor:
            yield f"parallel.tensor: got {parallel.tensor}; it must divide model.{name} ({size})"
    yield from _rope(model)
    yield from _windows(config)
    yield from _experts(model)


def _rope(model: ModelConfig) -> Iterator[str]:
    without = model.layers_without_rope
    if _are_no_layers(without, model):
        yield (
            f"model.layers_without_rope: got {without}; expected different numbers from 0 to "
            f"{model.layers - 1} (model.layers - 1)"
        )
    low, high = model.rope_low_frequency_factor, model.rope_high_frequency_factor
    if model.rope_scaling == "llama3" and low >= high:
        yield (
            f"model.rope_low_frequency_factor: got {low}; expected below "
            f"model.rope_high_frequency_factor ({high})"
        )
    if model.rope_scaling != "yarn":
        return
    if model.rope_beta_slow >= model.rope_beta_fast:
        yield (
            f"model.rope_beta_slow: got {model.rope_beta_slow}; expected below "
            f"model.rope_beta_fast ({model.rope_beta_fast})"
        )
    if model.rope_base <= 1:
        yield f"model.rope_base: got {model.rope_base} with rope_scaling yarn; expected above 1"


def _are_no_layers(numbers: list[int], model: ModelConfig) -> bool:
    """Whether a number stands in the list twice, or is that of no layer."""
    return len(set(numbers)) < len(numbers) or not set(numbers) <= set(range(model.layers))


def _windows(config: Config) -> Iterator[str]:
    model, window = config.model, config.model.attention_window_tokens
    full = model.full_attention_layers
    if full and not window:
        yield (
            f"model.full_attention_layers: got {full} with attention_window_tokens 0; every layer "
            "attends to the whole sequence: leave it out, or set attention_window_tokens"
        )
    if _are_no_layers(full, model):
        yield (
            f"model.full_attention_layers: got {full}; expected different numbers from 0 to "
            f"{model.layers - 1} (model.layers - 1)"
        )
    elif window and len(full) == model.layers:
        yield (
            f"model.full_attention_layers: got all {model.layers} layers, so that "
            f"attention_window_tokens {window} has no effect: set it to 0"
        )
    if model.rope_base_windowed and not window:
        yield (
            f"model.rope_base_windowed: got {model.rope_base_windowed} with "
            "attention_window_tokens 0; no layer has a window: leave it out, or set "
            "attention_window_tokens"
        )
    context = config.parallel.context
    shorter = 0 < window < config.data.sequence_length
    torch_native = config.device.layers == "torch" or torch_only_settings(config)
    if shorter and context > 1 and not torch_native:
        yield (
            f"parallel.context: got {context} with model.attention_window_tokens {window} and "
            f"device.layers {config.device.layers}; windows across context-parallel ranks are "
            "implemented in the torch-native layers: set device.layers to torch, or context to 1"
        )


def _experts(model: ModelConfig) -> Iterator[str]:
    if not model.experts:
        return
    if model.experts_per_token > model.experts:
        yield (
            f"model.experts_per_token: got {model.experts_per_token}; expected 1 up to "
            f"model.experts ({model.experts})"
        )
    if model.experts_per_token == 1 and model.renormalize_experts:
        yield (
            "model.renormalize_experts: got true with experts_per_token 1; the one expert's "
            "weight would always be 1 and the router would learn nothing: set it to false"
        )


def _expert_parallel(config: Config, world_size: int) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    inside = parallel.expert_tensor or parallel.tensor
    if not model.experts:
        if parallel.expert > 1 or parallel.expert_tensor:
            yield (
                f"parallel.expert: got expert {parallel.expert}, expert_tensor "
                f"{parallel.expert_tensor} for a model without experts; set model.experts, or "
                "expert to 1 and expert_tensor to 0"
            )
        return
    if model.experts % parallel.expert:
        yield (
            f"parallel.expert: got {parallel.expert}; it must divide model.experts "
            f"({model.experts})"
        )
    if model.ffn_hidden_size % inside:
        yield (
            f"parallel.expert_tensor: got {inside}; it must divide model.ffn_hidden_size "
            f"({model.ffn_hidden_size})"
        )
    if parallel.expert == 1 and inside != parallel.tensor:
        # megatron-core reduces expert gradients apart only when expert > 1; here they would miss
        # the tensor ranks' tokens, silently.
        yield (
            f"parallel.expert_tensor: got {inside} with tensor {parallel.tensor} and expert 1; "
            "set parallel.expert above 1, or expert_tensor to 0"
        )
    if world_size % (inside * parallel.expert * parallel.pipeline):
        yield (
            f"parallel.expert: expert_tensor {inside} x expert {parallel.expert} x pipeline "
            f"{parallel.pipeline} = {inside * parallel.expert * parallel.pipeline} processes hold "
            f"one copy of the experts, and {world_size} processes are not a multiple of that; "
            "lower parallel.expert, or start more processes"
        )
    if parallel.tensor > 1 and not parallel.sequence:
        yield (
            f"parallel.sequence: got false with tensor {parallel.tensor} and experts; every "
            "tensor rank would send the same tokens to the experts: set it to true"
        )


def parallel_problems(config: Config, world_size: int) -> Iterator[str]:
    parallel, model = config.parallel, config.model
    yield from _expert_parallel(config, world_size)
    per_model = model_parallel_size(config)
    if world_size % per_model:
        yield (
            f"parallel: tensor {parallel.tensor} x pipeline {parallel.pipeline} x context "
            f"{parallel.context} = {per_model} processes hold one copy of the model, "
            f"and {world_size} processes are not a multiple of that; start a multiple of "
            f"{per_model}, or change the layout"
        )
    stages = parallel.pipeline * parallel.virtual_pipeline
    if model.layers % stages:
        yield (
            f"model.layers: got {model.layers}; pipeline {parallel.pipeline} x virtual_pipeline "
            f"{parallel.virtual_pipeline} = {stages} stages must divide it"
        )
    if parallel.virtual_pipeline > 1 and parallel.pipeline == 1:
        yield (
            f"parallel.virtual_pipeline: got {parallel.virtual_pipeline} with pipeline 1; set "
            "parallel.pipeline above 1, or virtual_pipeline to 1"
        )
    if parallel.sequence and parallel.tensor == 1:
        yield (
            "parallel.sequence: got true with tensor 1; sequence parallelism splits over the "
            "tensor group: set parallel.tensor above 1, or sequence to false"
        )
    pieces = sequence_pieces(parallel.tensor if parallel.sequence else 1, parallel.context)
    if config.data.sequence_length % pieces:
        yield (
            f"data.sequence_length: got {config.data.sequence_length}; this layout cuts a "
            f"sequence into {pieces} equal pieces: use a multiple of {pieces}"
        )
    if parallel.overlap_param_gather is True and not (
        parallel.distributed_optimizer and parallel.overlap_grad_reduce
    ):
        yield (
            "parallel.overlap_param_gather: got true; it needs distributed_optimizer: true and "
            "overlap_grad_reduce: true or auto"
        )


def head_engine_problems(config: Config, world_size: int) -> Iterator[str]:
    device, hidden_size = config.device, config.model.hidden_size
    if device.head_engine == "torch":
        return
    if device.kind == "cpu" or device.precision != "bf16":
        yield (
            f"device.head_engine: got liger with device.kind {device.kind} and precision "
            f"{device.precision}; its kernels need a Hopper GPU and bf16: change those, or use "
            "torch"
        )
    if hidden_size % 64:
        yield (
            f"model.hidden_size: got {hidden_size}; device.head_engine liger needs a multiple of "
            "64: change it, or use torch"
        )


def fp8_problems(config: Config, world_size: int) -> Iterator[str]:
    device, model, parallel = config.device, config.model, config.parallel
    if device.fp8 == "none":
        return
    if device.precision != "bf16":
        yield (
            f"device.fp8: got {device.fp8} with device.precision {device.precision}; fp8 products "
            "stand in a bf16 model: set device.precision to bf16"
        )
    if device.layers == "torch":
        yield (
            f"device.fp8: got {device.fp8} with device.layers torch; only Transformer Engine's "
            "layers have fp8 products: set device.layers to auto"
        )
    if config.model.experts:
        yield (
            f"device.fp8: got {device.fp8} with model.experts {config.model.experts}; fp8 "
            "products need multiples of 16 tokens, and experts get any number: set it to none"
        )
    tokens = (
        config.data.micro_batch_size
        * config.data.sequence_length
        // (parallel.context * (parallel.tensor if parallel.sequence else 1))
    )
    sizes = {
        "model.hidden_size": model.hidden_size,
        "model.ffn_hidden_size / parallel.tensor": model.ffn_hidden_size // parallel.tensor,
        "tokens of a micro-batch on one process": tokens,
    }
    for name, size in sizes.items():
        if size % 16:
            yield (
                f"device.fp8: got {device.fp8}; {name} is {size}, and fp8 products need multiples "
                "of 16"
            )
