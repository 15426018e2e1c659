"""A decoder as megatron-core's GPTModel, with the selective head, in any parallel layout, from one seed."""

import hashlib
import math

import torch
from megatron.core.dist_checkpointing.mapping import ShardedTensor, apply_factories
from megatron.core.dist_checkpointing.utils import extract_sharded_tensors
from megatron.core.models.gpt import GPTModel
from megatron.core.parallel_state import is_pipeline_first_stage, is_pipeline_last_stage
from megatron.core.tensor_parallel.layers import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    set_tensor_model_parallel_attributes,
)
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_slm.accelerations import fp8_problem, has_module, has_transformer_engine
from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import padded_vocabulary_size
from megatron_slm.model.backward_rows import follow_selection_in_backward
from megatron_slm.model.layers import layer_spec
from megatron_slm.model.rope import scaled_frequencies
from megatron_slm.ops import linear_cross_entropy, selected_linear_cross_entropy
from megatron_slm.ops.liger_engine import check_liger
from megatron_slm.parallel import Groups

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


class Decoder(GPTModel):
    """megatron-core's GPTModel whose labels-path is the selective head: per-token fp32 losses, no logits kept.

    `forward(tokens, position_ids, attention_mask, labels=labels_BS)` gives loss_BS on the last stage, or [1+E, B, S] when
    `extra_outputs` names E more per-token values ("entropy"). With `loss_mask=weight_BS` too (0 = not selected) the head computes the selected
    rows only and gives (sum of weight * loss, loss_BS with NaN elsewhere). Without labels it gives logits, as GPTModel does.
    """

    vocabulary_size: int
    extra_outputs: tuple[str, ...] = ()
    head_engine: str = "torch"

    def _postprocess(
        self, hidden_states, input_ids, position_ids, labels, *args, loss_mask=None, **kwargs
    ):
        if not self.post_process or labels is None:
            return super()._postprocess(
                hidden_states, input_ids, position_ids, labels, *args, **kwargs
            )
        tied = self.share_embeddings_and_output_weights
        weight = self.shared_embedding_or_output_weight() if tied else self.output_layer.weight
        head = dict(
            vocabulary_size=self.vocabulary_size,
            tp_group=self.pg_collection.tp if self.pg_collection.tp.size() > 1 else None,
            sequence_parallel=self.config.sequence_parallel,
            accumulate_into_main_grad=self.config.gradient_accumulation_fusion,
        )
        labels_SB = labels.transpose(0, 1).contiguous()
        if loss_mask is not None:
            # This head makes its gradients in forward and stores them in the model's precision: in fp16 the loss scale must be in them by then.
            scale = (
                1.0
                if self.config.grad_scale_func is None
                else self.config.grad_scale_func(loss_mask.new_ones(()))
            )
            loss_sum, loss_SB = selected_linear_cross_entropy(
                hidden_states, weight, labels_SB, loss_mask.transpose(0, 1) * scale, **head
            )
            return (loss_sum / scale).squeeze(), loss_SB.transpose(0, 1).contiguous()
        result = linear_cross_entropy(
            hidden_states,
            weight,
            labels_SB,
            extras=self.extra_outputs,
            engine=self.head_engine,
            **head,
        )
        if not self.extra_outputs:
            return result.transpose(0, 1).contiguous()
        loss_SB, extras = result
        return (
            torch.stack([loss_SB, *(extras[name].float() for name in self.extra_outputs)])
            .transpose(1, 2)
            .contiguous()
        )


def transformer_config(
    config: Config, *, on_gpu: bool, grouped_experts: bool = False
) -> TransformerConfig:
    """megatron-core's TransformerConfig for our settings. `grouped_experts`: one grouped matrix product over a rank's experts (Transformer Engine)."""
    model, parallel = config.model, config.parallel
    dtype = DTYPES[config.device.precision]
    interleaved = parallel.virtual_pipeline > 1
    recompute = {
        "none": {},
        "selective": {"recompute_granularity": "selective"},
        "full": {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        },
    }[model.recompute]
    experts = (
        {}
        if not model.experts
        else dict(
            num_moe_experts=model.experts,
            moe_ffn_hidden_size=model.ffn_hidden_size,
            moe_router_topk=model.experts_per_token,
            moe_router_pre_softmax=not model.renormalize_experts,
            moe_router_dtype="fp32",
            moe_token_dispatcher_type="alltoall",
            moe_router_load_balancing_type={"sequence": "seq_aux_loss", "micro_batch": "aux_loss"}[
                model.load_balancing
            ],
            moe_aux_loss_coeff=model.load_balancing_coefficient,
            moe_z_loss_coeff=model.router_z_loss_coefficient or None,
            moe_grouped_gemm=grouped_experts,
            expert_model_parallel_size=parallel.expert,
            expert_tensor_parallel_size=parallel.expert_tensor or parallel.tensor,
        )
    )
    fused_weight_gradient = on_gpu and has_module("fused_weight_gradient_mlp_cuda")
    return TransformerConfig(
        num_layers=model.layers,
        hidden_size=model.hidden_size,
        ffn_hidden_size=model.ffn_hidden_size,
        num_attention_heads=model.attention_heads,
        num_query_groups=model.query_groups or model.attention_heads,
        kv_channels=model.head_size or model.hidden_size // model.attention_heads,
        normalization="RMSNorm",
        layernorm_epsilon=model.norm_epsilon,
        qk_layernorm=model.qk_norm,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        add_qkv_bias=model.qkv_bias,
        hidden_dropout=model.dropout,
        attention_dropout=model.dropout,
        init_method_std=model.initialization_std,
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        attention_backend=AttnBackend.auto,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        virtual_pipeline_model_parallel_size=parallel.virtual_pipeline if interleaved else None,
        context_parallel_size=parallel.context,
        sequence_parallel=parallel.sequence,
        # Interleaving over 2 ranks without overlap gives a wrong loss in silence: sends to both neighbours reach the same
        # peer and are matched in order (megatron-core 0.16.1 has no check). Overlap with unbatched p2p is right everywhere.
        overlap_p2p_comm=interleaved,
        batch_p2p_comm=not interleaved,
        # The loss stays a sum; gradients are divided once, by the global selected count
        # (docs/method.md#point-1).
        calculate_per_token_loss=True,
        gradient_accumulation_fusion=fused_weight_gradient,
        fp8=None if config.device.fp8 == "none" else config.device.fp8,
        fp8_recipe=config.device.fp8_recipe,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
        bias_activation_fusion=on_gpu,
        bias_dropout_fusion=on_gpu,
        masked_softmax_fusion=False,
        **recompute,
        **experts,
    )


def build_model(
    config: Config, vocabulary_size: int, groups: Groups, *, trainable: bool = True
) -> list[torch.nn.Module]:
    """This rank's model chunks (one, or one per virtual pipeline stage), initialised from run.seed.

    `trainable=False` freezes the weights and puts the model in eval mode: a reference
    (docs/method.md#point-18). bf16 and fp16 models come wrapped in megatron-core's Float16Module.
    ValueError: an engine that was asked for cannot run here.
    """
    from megatron.core.transformer.module import Float16Module

    on_gpu = groups.device.type == "cuda"
    layers = resolve_layers(config, on_gpu)
    if config.device.head_engine == "liger":
        check_liger(DTYPES[config.device.precision], groups.device, config.model.hidden_size)
    chunks = []
    for stage in range(groups.virtual_chunks):
        vp_stage = stage if groups.virtual_chunks > 1 else None
        core_config = transformer_config(
            config, on_gpu=on_gpu, grouped_experts=layers == "transformer_engine"
        )
        chunk = Decoder(
            core_config,
            layer_spec(core_config, layers, vp_stage),
            padded_vocabulary_size(config, vocabulary_size),
            config.data.sequence_length,
            pre_process=is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
            post_process=is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
            share_embeddings_and_output_weights=config.model.tied_embeddings,
            position_embedding_type="rope",
            rotary_base=config.model.rope_base,
            vp_stage=vp_stage,
        )
        chunk.vocabulary_size, chunk.head_engine = vocabulary_size, config.device.head_engine
        chunk.rotary_pos_emb.inv_freq = scaled_frequencies(
            chunk.rotary_pos_emb.inv_freq, config.model
        )
        _mark_tensor_parallel(chunk)
        if trainable:
            follow_selection_in_backward(chunk, config.selection.backward_rows, layers)
        chunks.append(chunk.to(groups.device))
    initialize_weights(
        chunks, config.run.seed, config.model.initialization_std, config.model.layers
    )
    if config.device.precision != "fp32":
        chunks = [Float16Module(chunk.config, chunk) for chunk in chunks]
    if not trainable:
        for chunk in chunks:
            chunk.requires_grad_(False).eval()
    return chunks


def _mark_tensor_parallel(chunk: torch.nn.Module) -> None:
    """Tell megatron-core which weights are split over the tensor group.

    Its layers do so only while they initialise their own weights, which we do ourselves; unmarked, the gradient norm would
    leave out the parts of every tensor rank but the first.
    """
    split_dimension = {ColumnParallelLinear: 0, VocabParallelEmbedding: 0, RowParallelLinear: 1}
    for module in chunk.modules():
        if type(module) in split_dimension and module.weight is not None:
            set_tensor_model_parallel_attributes(
                module.weight, True, split_dimension[type(module)], 1
            )


def resolve_layers(config: Config, on_gpu: bool) -> str:
    """ "torch" or "transformer_engine"; ValueError when Transformer Engine, or fp8, is asked for and cannot be had."""
    asked = (
        "torch" if config.data.document_policy == "isolated" else config.device.layers
    )  # check.py refuses the two together
    usable = on_gpu and has_transformer_engine()
    if asked == "transformer_engine" and not usable:
        why = "the device is the CPU" if not on_gpu else "it is not installed (see the Dockerfile)"
        raise ValueError(f"device.layers is transformer_engine, but {why}; use auto or torch")
    layers = "transformer_engine" if usable and asked != "torch" else "torch"
    if config.device.fp8 != "none" and (problem := fp8_problem(layers, config.device.fp8_recipe)):
        raise ValueError(
            f"device.fp8 is {config.device.fp8}, but {problem}; set device.fp8 to none"
        )
    return layers


def initialize_weights(chunks: list[torch.nn.Module], seed: int, std: float, layers: int) -> None:
    """Initial weights that depend on the seed and the parameter's name only: the same in every parallel layout.

    Normal with std `std`; matrices that write into the residual stream (attention output, MLP output) with
    std / sqrt(2 * layers), as GPT-2 and megatron-core do; norm weights 1, biases 0. Every full matrix is drawn from
    its own generator and cut to this rank's part, which costs the size of one full matrix for a moment.
    """
    sharded = {}
    for i, chunk in enumerate(chunks):
        sharded[i] = chunk.sharded_state_dict()
    apply_factories(sharded)
    tensors, _ = extract_sharded_tensors(sharded)
    for tensor in _leaves(tensors):
        _initialize(tensor, seed, std, layers)


def _leaves(tree):
    for value in tree.values() if isinstance(tree, dict) else tree:
        if isinstance(value, (dict, list)):
            yield from _leaves(value)
        elif isinstance(value, ShardedTensor):
            yield value


@torch.no_grad()
def _initialize(tensor: ShardedTensor, seed: int, std: float, layers: int) -> None:
    stacked = tensor.prepend_axis_num
    if "layer_norm" in tensor.key or "layernorm" in tensor.key:
        tensor.data.fill_(1.0)
    elif tensor.key.endswith("bias"):
        tensor.data.zero_()
    else:
        layer = tensor.global_offset[:stacked]
        digest = hashlib.sha256(f"{seed}/{tensor.key}/{layer}".encode()).digest()
        generator = torch.Generator(device=tensor.data.device).manual_seed(
            int.from_bytes(digest[:7], "little")
        )
        residual = tensor.key.endswith(("linear_proj.weight", "linear_fc2.weight"))
        full = torch.empty(
            tensor.global_shape[stacked:], dtype=torch.float32, device=tensor.data.device
        )
        full.normal_(0.0, std / math.sqrt(2 * layers) if residual else std, generator=generator)
        here = tuple(
            slice(o, o + n)
            for o, n in zip(tensor.global_offset[stacked:], tensor.local_shape, strict=True)
        )
        tensor.data.copy_(full[here])
