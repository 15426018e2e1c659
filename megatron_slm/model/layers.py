"""Layer specs: Transformer Engine's layers, or torch-native ones that run anywhere torch does.

megatron-core's own local layers refuse sequence parallelism (WrappedTorchNorm) and context
parallelism (DotProductAttention), and materialise [s, s] attention scores. These two modules
replace exactly those parts.

s: sequence (local to the sequence- or context-parallel rank), b: batch, n: heads, g: key/value
groups, d: head size.
"""

import torch
import torch.distributed as dist
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_block import (
    TransformerBlockSubmodules,
    get_num_layers_to_build,
)
from megatron.core.transformer.utils import is_layer_window_attention
from torch.nn.functional import scaled_dot_product_attention

from megatron_slm.accelerations import apex_rms_norm, transformer_engine_swiglu
from megatron_slm.config.schema import ModelConfig
from megatron_slm.core_versions import mlp_parts
from megatron_slm.model.layer_norm import LayerNorm
from megatron_slm.model.layer_variants import ParallelResidualLayer, SelfAttentionWithOwnBias
from megatron_slm.model.router import Router
from megatron_slm.model.window_mask import WindowMask


class RMSNorm(torch.nn.Module):
    """torch.nn.functional.rms_norm in fp32, with a weight; by apex's fused kernel where it is
    built.

    With config.layernorm_zero_centered_gamma normalised values are multiplied by 1 + weight, which
    starts at 0 (Gemma). The sum is fp32, as in transformers: apex's kernel has no such factor.

    Under sequence parallelism each tensor rank sees other positions, so the weight's gradient must
    be summed over the tensor group; megatron-core does that for weights with `sequence_parallel`
    set (_allreduce_non_tensor_model_parallel_grads).
    """

    def __init__(
        self,
        config: TransformerConfig,
        hidden_size: int,
        eps: float = 1e-5,
        **_ignored_by_megatron_norms,
    ):
        super().__init__()
        self.epsilon = eps
        self.zero_centered = config.layernorm_zero_centered_gamma
        begin = torch.zeros if self.zero_centered else torch.ones
        self.weight = torch.nn.Parameter(
            begin(hidden_size, dtype=config.params_dtype, device=torch.cuda.current_device())
        )
        vars(self.weight)["sequence_parallel"] = config.sequence_parallel
        # Sums in fp32 too, reads and writes the hidden state once.
        self.fused = None if self.zero_centered else apex_rms_norm()

    def factor(self) -> torch.Tensor:
        """What normalised values are multiplied by."""
        return 1 + self.weight.float() if self.zero_centered else self.weight

    def forward(self, hidden_sbh: torch.Tensor) -> torch.Tensor:
        if self.fused is not None:
            return self.fused(hidden_sbh, self.factor(), (hidden_sbh.shape[-1],), self.epsilon)
        normed = torch.nn.functional.rms_norm(
            hidden_sbh.float(), (hidden_sbh.shape[-1],), self.factor().float(), self.epsilon
        )
        return normed.to(hidden_sbh.dtype)


class EngineSwiGLU(torch.nn.Module):
    """Transformer Engine's SwiGLU, silu(first half) * second half, without a place in checkpoints.

    As a child module it would add its quantization state to every checkpoint, and megatron-core
    0.16.1 asks it for a sharded_state_dict that it does not have.
    """

    def __init__(self, config: TransformerConfig):
        super().__init__()
        operation = transformer_engine_swiglu()
        assert operation is not None  # transformer_config asks for it only where it is
        self.unregistered = (operation(),)

    def forward(self, both_halves: torch.Tensor) -> torch.Tensor:
        return self.unregistered[0](both_halves)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None) -> dict:
        return {}


class CausalAttention(torch.nn.Module):
    """Causal attention by torch's scaled_dot_product_attention, also under context parallelism.

    Equals softmax(QK^T / sqrt(d) + causal mask) V. With context parallelism a rank holds chunks r
    and 2c-1-r of the 2c equal chunks of the sequence (megatron-core's head-tail slicing, which
    balances causal work). Keys and values are all-gathered over the context group (their gradient
    is reduce-scattered), put in order, and each of the two query chunks attends to its prefix. A
    mask (bool, True = hidden) has a row per query here and a column per token of the whole
    sequence; it must hide the future itself.

    In a layer with a sliding window of w tokens a query attends to itself and the w - 1 tokens
    before it. Queries are taken in blocks of at most w, each with the keys that it can see, so that
    a long sequence costs s * 2w and not s * s.
    """

    def __init__(
        self,
        config: TransformerConfig,
        layer_number: int,
        attn_mask_type,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        cp_comm_type: str | None = None,
        pg_collection=None,
        window: WindowMask | None = None,
    ):
        super().__init__()
        self.scale = softmax_scale  # None = 1/sqrt(head size), torch's default
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        skipped = config.window_attn_skip_freq
        self.window: WindowMask | None = None  # None = the whole sequence
        if is_layer_window_attention(config.window_size, skipped, layer_number):
            assert config.window_size is not None  # or no layer would have a window
            self.window = window or WindowMask(config.window_size[0] + 1)
        self.context_group: dist.ProcessGroup | None = None
        if pg_collection is not None and config.context_parallel_size > 1:
            self.context_group = pg_collection.cp

    def forward(
        self,
        query_sbnd,
        key_sbgd,
        value_sbgd,
        attention_mask,
        attn_mask_type=None,
        attention_bias=None,
        packed_seq_params=None,
    ):
        if attention_bias is not None or packed_seq_params is not None:
            raise NotImplementedError(
                "torch-native attention takes neither an attention bias nor packed sequences; use "
                "device.layers: transformer_engine"
            )
        query = query_sbnd.permute(1, 2, 0, 3)  # [b, n, s, d]
        if self.context_group is not None:
            key = _whole_sequence(key_sbgd, self.context_group)
            value = _whole_sequence(value_sbgd, self.context_group)
            context = self._attend_chunks(query, key, value, attention_mask, self.context_group)
        else:
            key = key_sbgd.permute(1, 2, 0, 3)
            value = value_sbgd.permute(1, 2, 0, 3)
            if self.window is not None and self.window.window_tokens < query.shape[2]:
                context = self._attend_windows(query, key, value, attention_mask, self.window)
            elif attention_mask is not None:  # bool, True = hidden, megatron-core's sense
                context = self._attend(query, key, value, attn_mask=~attention_mask)
            else:
                context = self._attend(query, key, value, is_causal=True)
        return context.permute(2, 0, 1, 3).flatten(2)  # [s, b, n*d]

    def _attend(self, query, key, value, **mask):
        return scaled_dot_product_attention(
            query,
            key,
            value,
            dropout_p=self.dropout if self.training else 0.0,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
            **mask,
        )

    def _attend_windows(self, query, key, value, hidden, window: WindowMask, first_query: int = 0):
        """Queries from place first_query of the sequence on, in blocks of at most a window.

        `hidden`, if any, has their rows and a column per key.
        """
        outputs = []
        for rows in window.blocks(query.shape[2]):
            block, first = query[:, :, rows], first_query + rows.start
            seen = window.keys(first, block.shape[2])
            mask = window.added(first, block.shape[2], like=query)
            if hidden is not None:
                mask = (mask == 0) & ~hidden[:, :, rows, seen]
            outputs.append(self._attend(block, key[:, :, seen], value[:, :, seen], attn_mask=mask))
        return torch.cat(outputs, dim=2)

    def _attend_chunks(self, query, key, value, hidden, context_group: dist.ProcessGroup):
        # Imported here: this module of torch loads torch.compile's tracer, a tenth of the start-up
        # time of a run that has no context parallelism.
        from torch.nn.attention.bias import causal_lower_right

        size = context_group.size()
        rank = context_group.rank()
        length = query.shape[2] // 2
        outputs = []
        for place, chunk in enumerate((rank, 2 * size - 1 - rank)):
            rows = slice(place * length, (place + 1) * length)
            end = (chunk + 1) * length  # of the prefix that this chunk attends to
            chunk_query = query[:, :, rows]
            if self.window is not None and self.window.window_tokens < end:
                own = None if hidden is None else hidden[:, :, rows]
                outputs.append(
                    self._attend_windows(
                        chunk_query, key, value, own, self.window, first_query=chunk * length
                    )
                )
                continue
            mask = causal_lower_right(length, end) if hidden is None else ~hidden[:, :, rows, :end]
            outputs.append(
                self._attend(chunk_query, key[:, :, :end], value[:, :, :end], attn_mask=mask)
            )
        return torch.cat(outputs, dim=2)


def _whole_sequence(part_sbgd: torch.Tensor, context_group: dist.ProcessGroup) -> torch.Tensor:
    """All-gather over the context group and undo head-tail slicing.

    [s/c, b, g, d] -> [b, g, s, d]
    """
    size = context_group.size()
    gathered = gather_from_sequence_parallel_region(part_sbgd.contiguous(), group=context_group)
    chunks = gathered.chunk(2 * size, dim=0)  # rank r contributes chunks r and 2c-1-r
    order = [2 * r if r < size else 2 * (2 * size - 1 - r) + 1 for r in range(2 * size)]
    return torch.cat([chunks[i] for i in order]).permute(1, 2, 0, 3)


def layer_spec(config: TransformerConfig, model: ModelConfig, layers: str, vp_stage: int | None):
    """The decoder's spec for this pipeline stage: `layers` is "torch" or "transformer_engine".

    model: what config was made from.
    """
    if layers == "transformer_engine":
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts,
            moe_grouped_gemm=config.moe_grouped_gemm,
            qk_layernorm=config.qk_layernorm,
        )
        if config.num_moe_experts:
            mlp_parts(layer).router = Router
        elif config.use_te_activation_func:
            mlp_parts(layer).activation_func = EngineSwiGLU
        _use_variants(layer, model)
        return layer
    layer = get_gpt_layer_local_spec(
        num_experts=config.num_moe_experts,
        moe_grouped_gemm=config.moe_grouped_gemm,
        qk_layernorm=config.qk_layernorm,
        normalization=config.normalization,
    )
    parts = layer.submodules
    norm = LayerNorm if config.normalization == "LayerNorm" else RMSNorm
    parts.input_layernorm = parts.pre_mlp_layernorm = norm
    if config.num_moe_experts:
        mlp_parts(layer).router = Router
        # Transformer Engine fuses no norm into a mixture and stores it under its own name; the same
        # is done here, so that checkpoints fit both.
        del parts.sharded_state_dict_keys_map["pre_mlp_layernorm."]
    attention = parts.self_attention.submodules
    attention.core_attention = CausalAttention
    if config.window_size is not None:
        shared = {"window": WindowMask(config.window_size[0] + 1)}
        attention.core_attention = ModuleSpec(module=CausalAttention, params=shared)
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = norm
    _use_variants(layer, model)
    this_stage: list[ModuleSpec] = [layer] * get_num_layers_to_build(config, vp_stage=vp_stage)
    return TransformerBlockSubmodules(layer_specs=this_stage, layer_norm=norm)


def _use_variants(layer: ModuleSpec, model: ModelConfig) -> None:
    """Put layer_variants.py's classes into a layer's spec where megatron-core's are not the
    model's.
    """
    if model.parallel_residual:
        layer.module = ParallelResidualLayer
    if model.attention_output_bias != model.feed_forward_bias:
        attention = layer.submodules.self_attention
        attention.module = SelfAttentionWithOwnBias
        attention.params = {**attention.params, "output_bias": model.attention_output_bias}
