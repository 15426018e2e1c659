"""A decoder in any parallel layout, from one seed."""

from typing import Literal

import torch
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer.module import Float16Module, MegatronModule

from megatron_slm.accelerations import (
    fp8_problem,
    fused_layers_problem,
    has_transformer_engine,
)
from megatron_slm.config.layer_engine import torch_only_settings
from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import padded_vocabulary_size
from megatron_slm.model.backward_rows import follow_selection_in_backward
from megatron_slm.model.decoder import Decoder, scale_embedding
from megatron_slm.model.fused_layers import use_fused_passes
from megatron_slm.model.initialization import initialize_weights
from megatron_slm.model.layers import layer_spec
from megatron_slm.model.norm_placement import place_norms
from megatron_slm.model.rope import (
    scaled_frequencies,
    turn_windowed_layers,
    unscale_layers_without_rope,
)
from megatron_slm.model.transformer_config import DTYPES, transformer_config
from megatron_slm.ops.liger_engine import check_liger
from megatron_slm.parallel import Groups

_POSITIONS: dict[str, Literal["rope", "learned_absolute"]] = {
    "rope": "rope",
    "learned": "learned_absolute",
}


def build_model(
    config: Config, vocabulary_size: int, groups: Groups, *, trainable: bool = True
) -> list[MegatronModule]:
    """This rank's model chunks (one, or one per virtual pipeline stage), initialised from run.seed.

    `trainable=False` freezes the weights and puts the model in eval mode: a reference
    (docs/method.md#point-18). bf16 and fp16 models come wrapped in megatron-core's Float16Module.
    Raises ValueError if the configured engine cannot run here.
    """
    layers = resolve_layers(config, on_gpu=groups.device.type == "cuda")
    if config.device.head_engine == "liger":
        check_liger(DTYPES[config.device.precision], groups.device, config.model.hidden_size)
    decoders = []
    for stage in range(groups.virtual_chunks):
        vp_stage = stage if groups.virtual_chunks > 1 else None
        decoder = _decoder(config, vocabulary_size, groups, layers, vp_stage)
        fuse_layers(decoder, config, layers, groups)
        if trainable:
            follow_selection_in_backward(decoder, config.selection.backward_rows, layers)
        decoders.append(decoder.to(groups.device))
    initialize_weights(decoders, config.run.seed, config.model)
    chunks: list[MegatronModule] = decoders
    if config.device.precision != "fp32":
        chunks = [Float16Module(decoder.config, decoder) for decoder in decoders]
    if not trainable:
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    return chunks


def _decoder(
    config: Config, vocabulary_size: int, groups: Groups, layers: str, vp_stage: int | None
) -> Decoder:
    """One pipeline chunk, its weights not yet drawn."""
    model = config.model
    core_config = transformer_config(config, on_gpu=groups.device.type == "cuda", layers=layers)
    decoder = Decoder(
        core_config,
        layer_spec(core_config, model, layers, vp_stage),
        padded_vocabulary_size(config, vocabulary_size),
        model.learned_positions or config.data.sequence_length,
        pre_process=is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        post_process=is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
        share_embeddings_and_output_weights=model.tied_embeddings,
        position_embedding_type=_POSITIONS[model.position_embedding],
        rotary_percent=model.rope_fraction,
        rotary_base=model.rope_base,
        vp_stage=vp_stage,
    )
    decoder.vocabulary_size = vocabulary_size
    decoder.head_engine = config.device.head_engine
    if model.position_embedding == "rope":
        rope = decoder.rotary_pos_emb
        rope.inv_freq = scaled_frequencies(rope.inv_freq, model, config.data.sequence_length)
    if layers == "torch":
        place_norms(decoder, model)
        unscale_layers_without_rope(decoder, model)
    if model.rope_base_windowed:
        turn_windowed_layers(decoder, model)
    if decoder.pre_process and model.embedding_scale != 1:
        scale_embedding(decoder.embedding, model.embedding_scale)
    _mark_tensor_parallel(decoder)
    return decoder


def fuse_layers(chunk: torch.nn.Module, config: Config, layers: str, groups: Groups) -> None:
    """Give a GPTModel's layers the fused passes, where device.fused_layers and the device do."""
    on_gpu = groups.device.type == "cuda"
    if not fused_layers_problem(on_gpu, layers, config.device.fused_layers):
        use_fused_passes(chunk)


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Tell megatron-core which weights are split over the tensor group.

    megatron-core 0.16.1's layers set this mark only when they initialise their own weights, but
    initialization.py draws ours; 0.19.2's always do. Without the mark the gradient norm would leave
    out the parts of every tensor rank but the first.
    """
    split_dimension = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        dimension = split_dimension.get(type(module))
        if dimension is None or module.weight is None:
            continue
        if not hasattr(module.weight, "tensor_model_parallel"):
            set_tensor_model_parallel_attributes(module.weight, True, dimension, 1)


def resolve_layers(config: Config, on_gpu: bool) -> str:
    """Which layers the model is made of: "torch" or "transformer_engine".

    Raises ValueError if Transformer Engine, or fp8, is configured and not available.
    """
    # config/check.py refuses what needs torch-native layers together with Transformer Engine's.
    wanted = "torch" if torch_only_settings(config) else config.device.layers
    usable = on_gpu and has_transformer_engine()
    if wanted == "transformer_engine" and not usable:
        why = "the device is the CPU" if not on_gpu else "it is not installed (see the Dockerfile)"
        raise ValueError(f"device.layers is transformer_engine, but {why}; use auto or torch")
    layers = "transformer_engine" if usable and wanted != "torch" else "torch"
    if config.device.fp8 != "none" and (problem := fp8_problem(layers, config.device.fp8_recipe)):
        raise ValueError(
            f"device.fp8 is {config.device.fp8}, but {problem}; set device.fp8 to none"
        )
    return layers
