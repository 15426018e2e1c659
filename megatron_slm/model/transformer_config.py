"""Our settings as megatron-core's TransformerConfig."""

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend

from megatron_slm.accelerations import has_module, transformer_engine_swiglu
from megatron_slm.config.schema import Config, ModelConfig, ParallelConfig
from megatron_slm.model.rope import attention_scale

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_RECOMPUTE: dict[str, dict[str, Any]] = {
    "none": {},
    "selective": {"recompute_granularity": "selective"},
    "full": {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    },
}
_LOAD_BALANCING = {"sequence": "seq_aux_loss", "micro_batch": "aux_loss"}
_NORMALIZATION = {"rmsnorm": "RMSNorm", "layernorm": "LayerNorm"}


def gelu_tanh(x: torch.Tensor) -> torch.Tensor:
    """GELU's tanh approximation (Hendrycks and Gimpel, arXiv 1606.08415): GPT-2's gelu_new."""
    return torch.nn.functional.gelu(x, approximate="tanh")


_ACTIVATIONS: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
    "silu": torch.nn.functional.silu,
    "gelu": torch.nn.functional.gelu,
    "gelu_tanh": gelu_tanh,
    "relu": torch.nn.functional.relu,
}


def transformer_config(config: Config, *, on_gpu: bool, layers: str = "torch") -> TransformerConfig:
    """megatron-core's TransformerConfig for our settings; layers: torch or transformer_engine."""
    dtype = DTYPES[config.device.precision]
    engine = layers == "transformer_engine"
    return TransformerConfig(
        **_architecture(config.model),
        **_layout(config.parallel),
        **_RECOMPUTE[config.model.recompute],
        **_experts(config.model, config.parallel, grouped=engine),
        **_fusions(config.model, on_gpu, engine),
        bf16=dtype is torch.bfloat16,
        fp16=dtype is torch.float16,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        fp8=None if config.device.fp8 == "none" else config.device.fp8,
        fp8_recipe=config.device.fp8_recipe,
        attention_backend=AttnBackend.auto,
        # The loss stays a sum; gradients are divided once, by the global selected count
        # (docs/method.md#point-1).
        calculate_per_token_loss=True,
        perform_initialization=False,
        use_cpu_initialization=not on_gpu,
    )


def _fusions(model: ModelConfig, on_gpu: bool, engine: bool) -> dict[str, Any]:
    """Passes that are one kernel; training/acceleration_rows.py says which are on.

    engine: the layers are Transformer Engine's, whose norms and dropout are fused without being
    asked. Its gradients go to main_grad by wrap_data_parallel, and by apex's extension here.
    """
    # The SwiGLU of experts also weighs tokens, which Transformer Engine's does not: there
    # megatron-core's compiled one needs fewer passes.
    is_swiglu = model.gated_feed_forward and model.activation == "silu"
    swiglu = is_swiglu and engine and not model.experts and transformer_engine_swiglu() is not None
    return {
        "apply_rope_fusion": engine,
        "use_te_activation_func": swiglu,
        # megatron-core's compiled GELU is the tanh approximation, whichever it is asked for.
        "bias_activation_fusion": on_gpu and is_swiglu and not swiglu,
        "bias_dropout_fusion": on_gpu,
        "masked_softmax_fusion": False,
        "gradient_accumulation_fusion": on_gpu and has_module("fused_weight_gradient_mlp_cuda"),
    }


def _architecture(model: ModelConfig) -> dict[str, Any]:
    return {
        "num_layers": model.layers,
        "hidden_size": model.hidden_size,
        "ffn_hidden_size": model.ffn_hidden_size,
        "num_attention_heads": model.attention_heads,
        "num_query_groups": model.query_groups or model.attention_heads,
        "kv_channels": model.head_size or model.hidden_size // model.attention_heads,
        "normalization": _NORMALIZATION[model.normalization],
        "layernorm_epsilon": model.norm_epsilon,
        "layernorm_zero_centered_gamma": model.zero_centered_norms,
        # Norms over all heads are placed later, by norm_placement.py.
        "qk_layernorm": model.qk_norm and model.qk_norm_over == "head",
        "gated_linear_unit": model.gated_feed_forward,
        "activation_func": _ACTIVATIONS[model.activation],
        # Of the feed-forward layer; attention's output projection has its own (layer_spec).
        "add_bias_linear": model.feed_forward_bias,
        "add_qkv_bias": model.qkv_bias,
        **_windows(model),
        **_layers_without_rope(model),
        "softmax_scale": attention_scale(model),
        "hidden_dropout": model.dropout,
        "attention_dropout": model.dropout,
        "init_method_std": model.initialization_std,
    }


def _windows(model: ModelConfig) -> dict[str, Any]:
    """Sliding-window attention; torch-native layers and Transformer Engine's read the same."""
    if not model.attention_window_tokens:
        return {}
    full = set(model.full_attention_layers)
    return {
        # (tokens before a token, tokens after it) that it attends to beside itself.
        "window_size": (model.attention_window_tokens - 1, 0),
        # By global layer number: 1 = windowed, 0 = the whole sequence.
        "window_attn_skip_freq": [int(layer not in full) for layer in range(model.layers)],
    }


def _layers_without_rope(model: ModelConfig) -> dict[str, Any]:
    if not model.layers_without_rope:
        return {}
    without = set(model.layers_without_rope)
    # By global layer number: 1 = queries and keys are not rotated.
    return {"no_rope_freq": [int(layer in without) for layer in range(model.layers)]}


def _layout(parallel: ParallelConfig) -> dict[str, Any]:
    interleaved = parallel.virtual_pipeline > 1
    return {
        "tensor_model_parallel_size": parallel.tensor,
        "pipeline_model_parallel_size": parallel.pipeline,
        "virtual_pipeline_model_parallel_size": parallel.virtual_pipeline if interleaved else None,
        "context_parallel_size": parallel.context,
        "sequence_parallel": parallel.sequence,
        # Interleaving over 2 ranks without overlap silently gives a wrong loss: sends to the
        # previous and the next stage reach the same peer and are matched in order (megatron-core
        # 0.16.1 has no check). Overlap with unbatched p2p is right everywhere.
        "overlap_p2p_comm": interleaved,
        "batch_p2p_comm": not interleaved,
    }


def _experts(model: ModelConfig, parallel: ParallelConfig, grouped: bool) -> dict[str, Any]:
    if not model.experts:
        return {}
    return {
        "num_moe_experts": model.experts,
        "moe_ffn_hidden_size": model.ffn_hidden_size,
        "moe_router_topk": model.experts_per_token,
        "moe_router_pre_softmax": not model.renormalize_experts,
        "moe_router_dtype": "fp32",
        "moe_token_dispatcher_type": "alltoall",
        "moe_router_load_balancing_type": _LOAD_BALANCING[model.load_balancing],
        "moe_aux_loss_coeff": model.load_balancing_coefficient,
        "moe_z_loss_coeff": model.router_z_loss_coefficient or None,
        "moe_grouped_gemm": grouped,
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.expert_tensor or parallel.tensor,
    }
