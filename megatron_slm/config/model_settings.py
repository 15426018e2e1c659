"""The settings of schema.py that say what is computed: the device, the model and its layout.

Other files import these classes from schema.py, which has the whole of a run.
"""

from dataclasses import dataclass, field
from typing import Annotated, Literal

from megatron_slm.config.ranges import (
    BelowOne,
    Count,
    NotNegative,
    Positive,
    Range,
    Size,
)


@dataclass
class DeviceConfig:
    """What the run computes on."""

    kind: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = CUDA with NCCL where there is a GPU, otherwise CPU processes with gloo."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Precision of weights and activations; bf16 and fp16 keep fp32 main weights and accumulate
    gradients in fp32; fp16 scales the loss."""
    fp8: Literal["none", "hybrid", "e4m3"] = "none"
    """fp8 matrix products of Transformer Engine's layers: hybrid = e4m3 forward, e5m2 for
    gradients. Needs bf16, and compute capability 8.9."""
    fp8_recipe: Literal["tensorwise", "delayed", "blockwise", "mxfp8"] = "tensorwise"
    """How fp8 scales are found: tensorwise keeps no history, so a resumed run is the same run;
    delayed does; mxfp8 needs Blackwell."""
    layers: Literal["auto", "torch", "transformer_engine"] = "auto"
    """Layer implementation; auto = Transformer Engine when it is installed, the device is CUDA and
    its layers have what the model needs, else torch-native."""
    fused_layers: Literal["auto", "none"] = "auto"
    """RMSNorm, SwiGLU and rotary embedding of the torch-native layers as one Triton pass each;
    auto = on CUDA where triton is installed; none = torch's operations, as on a CPU."""
    head_engine: Literal["torch", "liger"] = "torch"
    """Who computes the head's backward; liger = Liger-Kernel's Hopper kernels on the selected rows
    (H100, H200; bf16; liger-kernel[cutedsl])."""
    threads_per_process: Annotated[int, Range(at_least=0, at_most=4096)] = 0
    """CPU threads of each process; 0 = cores / processes on this machine."""
    timeout_minutes: Annotated[int, Range(at_least=1, at_most=525_600)] = 30
    """How long a collective may wait for the slowest rank before the job is stopped."""
    step_timeout_minutes: Count = 10
    """The same for the collectives of a training step, from the second step on; 0 =
    timeout_minutes, and so it is where monitoring.hang_seconds is 0. It is never below twice
    monitoring.hang_seconds or three times the first step, so that a run which hangs has written its
    stacks before a collective ends it."""
    garbage_collection_steps: Count = 50
    """Training collects Python's garbage on all ranks after the same step, every so many steps,
    instead of whenever one rank's counter is full, which makes the others wait; 0 = Python decides.
    """
    flight_recorder_entries: Count = 2000
    """Collectives of a training run that NCCL's flight recorder remembers on each rank. They are
    written to RUN/ranks/ when the run hangs; 0 = none. CUDA only."""


@dataclass
class ModelConfig:
    """A decoder-only transformer with grouped-query attention. The defaults are Llama's parts:
    rotary embedding, RMSNorm, SwiGLU, no biases."""

    from_checkpoint: str = ""
    """Run folder or checkpoint whose architecture this model has: every setting of this section
    that says what weights mean is taken from it. One that is given as well and differs is refused.
    Weights are not taken: checkpoint.initialize_from does that."""
    layers: Size = 4
    """Transformer layers."""
    hidden_size: Size = 256
    """Width of the residual stream."""
    ffn_hidden_size: Size = 704
    """Width of the feed-forward layer; in a mixture of experts, of each expert."""
    activation: Literal["silu", "gelu", "gelu_tanh", "relu"] = "silu"
    """Activation of the feed-forward layer; gelu = the exact one (GPT-NeoX), gelu_tanh = its tanh
    approximation (GPT-2)."""
    gated_feed_forward: bool = True
    """The activated product is multiplied by a second one of the input (SwiGLU with silu, GeGLU
    with gelu); false = one product, as in GPT-2 and GPT-NeoX."""
    attention_heads: Size = 4
    """Query heads; must divide hidden_size unless head_size is set."""
    query_groups: Count = 0
    """Key/value heads of grouped-query attention; 0 = one per query head (multi-head attention)."""
    head_size: Count = 0
    """Size of one head; 0 = hidden_size / attention_heads."""
    attention_scale_size: NotNegative = 0.0
    """Products of queries and keys are divided by the square root of this (Gemma 3's
    query_pre_attn_scalar); 0 = the size of a head."""
    vocabulary_size: Count = 0
    """True vocabulary size; 0 = the tokenizer's."""
    pad_vocabulary_to_multiple_of: Size = 128
    """The embedding is padded to a multiple of this and of the tensor-parallel size; padded columns
    are excluded from every loss."""
    attention_window_tokens: Count = 0
    """Sliding-window attention: tokens that a token attends to, itself included (Mistral); 0 = all
    before it."""
    rope_base_windowed: NotNegative = 0.0
    """Base of the rotary embedding in layers with a sliding window, which rope_scaling then leaves
    alone (Gemma 3: 10000 beside 1000000; OLMo 3: the same base, for its scaling of the other layers
    alone); 0 = as in all layers."""
    full_attention_layers: list[Count] = field(default_factory=list)
    """Layers, counted from 0, that attend to the whole sequence although attention_window_tokens is
    set (Qwen-2, Qwen-3, Ministral)."""
    position_embedding: Literal["rope", "learned"] = "rope"
    """How positions enter: rope = rotary embedding of queries and keys; learned = a table that is
    added to the token embedding (GPT-2)."""
    learned_positions: Count = 0
    """Rows of the table of learned positions, at least data.sequence_length; for position_embedding
    learned alone."""
    rope_base: Positive = 10000.0
    """Base of the rotary position embedding."""
    rope_fraction: Annotated[float, Range(above=0, at_most=1)] = 1.0
    """Share of each head's channels that the rotary embedding turns, from the first one on
    (GPT-NeoX: 0.25); the others carry no position."""
    rope_scaling: Literal["none", "linear", "llama3", "yarn", "dynamic", "longrope"] = "none"
    """Stretching of the rotary embedding for longer sequences: linear = every frequency / factor;
    llama3 = only slow frequencies (Llama 3.1's rule); yarn = only slow frequencies, and sharper
    attention (Qwen-2.5 and Qwen-3 beyond 32,768 tokens); dynamic = a larger base where
    data.sequence_length is above rope_original_sequence_length (NTK-aware); longrope = each channel
    by its own factor, and by another one above that length (Phi-3)."""
    rope_scaling_factor: Annotated[float, Range(at_least=1)] = 8.0
    """How far rope_scaling stretches; at least 1."""
    rope_original_sequence_length: Size = 8192
    """Sequence length in tokens before stretching: wavelengths (llama3, yarn) or
    data.sequence_length (dynamic, longrope) are compared with it."""
    rope_low_frequency_factor: Positive = 1.0
    """Wavelengths above rope_original_sequence_length / this are stretched fully (llama3 only)."""
    rope_high_frequency_factor: Positive = 4.0
    """Wavelengths below rope_original_sequence_length / this are left alone (llama3 only); between
    the two, a linear blend."""
    rope_beta_fast: Positive = 32.0
    """Channels that turn more often than this within rope_original_sequence_length are left alone
    (yarn only)."""
    rope_beta_slow: Positive = 1.0
    """Channels that turn less often than this are stretched fully (yarn only); between the two, a
    linear blend over channels."""
    rope_attention_factor: NotNegative = 0.0
    """Factor of rotated queries and of rotated keys (yarn, longrope); 0 = 0.1
    ln(rope_scaling_factor) + 1 (yarn), sqrt(1 + ln(rope_scaling_factor) /
    ln(rope_original_sequence_length)) (longrope)."""
    rope_short_factors: list[Positive] = field(default_factory=list)
    """Divisors of the rotary frequencies, one for each two channels, where data.sequence_length is
    at most rope_original_sequence_length (longrope only)."""
    rope_long_factors: list[Positive] = field(default_factory=list)
    """The same where it is longer (longrope only)."""
    layers_without_rope: list[Count] = field(default_factory=list)
    """Layers, counted from 0, whose queries and keys are not rotated (SmolLM3: every fourth). They
    see the order of tokens through the causal mask alone."""
    normalization: Literal["rmsnorm", "layernorm"] = "rmsnorm"
    """Norms of the residual stream, and of queries and keys; layernorm has a weight and a bias
    (GPT-2, GPT-NeoX)."""
    norm_epsilon: Positive = 1e-5
    """Epsilon of the norms."""
    parallel_residual: bool = False
    """Attention and feed-forward layer read the same residual stream, each through its own norm,
    and both outputs are added to it (GPT-NeoX); false = the feed-forward layer reads what attention
    has been added to."""
    tied_embeddings: bool = False
    """Share the input embedding with the output head."""
    embedding_scale: Positive = 1.0
    """Factor of the input embedding (Gemma: the square root of hidden_size), rounded to
    device.precision as transformers rounds it."""
    norm_placement: Literal["before", "after", "both"] = "before"
    """Where the norms of a layer stand: before attention and the feed-forward layer; after = on
    their outputs instead, before these are added to the residual stream (OLMo 2, OLMo 3); both
    (Gemma 2, Gemma 3)."""
    zero_centered_norms: bool = False
    """Every norm multiplies by 1 + weight, and its weights start at 0 (Gemma)."""
    qkv_bias: bool = False
    """Bias on the query, key and value projections (Qwen-2 style)."""
    attention_output_bias: bool = False
    """Bias on the output projection of attention; needs qkv_bias."""
    feed_forward_bias: bool = False
    """Bias on both products of the feed-forward layer; not in a mixture of experts."""
    qk_norm: bool = False
    """Norm of queries and keys (Qwen-3 style)."""
    qk_norm_over: Literal["head", "all_heads"] = "head"
    """What qk_norm normalises: each head by itself with one weight for all of them, or all heads
    of a token together with a weight of that width (OLMo 2, OLMo 3)."""
    experts: Count = 0
    """Experts of the mixture that replaces every feed-forward layer (Mixtral, Qwen3-MoE); 0 = one
    dense feed-forward layer."""
    experts_per_token: Size = 2
    """Experts each token is sent to (top-k of the router).

    Nothing is dropped: an expert takes every token that chooses it."""
    renormalize_experts: bool = True
    """Weights of a token's experts sum to 1 (softmax over the chosen ones); false = their share of
    the softmax over all experts."""
    load_balancing: Literal["sequence", "micro_batch"] = "micro_batch"
    """Tokens over which the load of the experts is balanced; sequence = the same in every layout,
    micro_batch = changes with micro_batch_size."""
    load_balancing_coefficient: NotNegative = 0.01
    """Weight of the load-balancing loss, over all tokens whether selected or not; 0 = none."""
    router_z_loss_coefficient: NotNegative = 0.0
    """Weight of the router z-loss (mean squared logsumexp of the router's logits), over all tokens;
    0 = none."""
    initialization_std: NotNegative = 0.02
    """Standard deviation of the initial weights."""
    dropout: BelowOne = 0.0
    """Dropout; keep 0 for selective training: dropout noise raises the current loss and biases the
    excess."""
    recompute: Literal["none", "selective", "full"] = "none"
    """Activation recomputation in backward: the attention core (selective) or every layer (full).
    """


@dataclass
class ParallelConfig:
    """How the model and the batch are spread; data parallelism takes the processes that remain."""

    tensor: Size = 1
    """Tensor-parallel size: each layer's matrices are split over this many processes."""
    pipeline: Size = 1
    """Pipeline-parallel size: the layers are split over this many processes."""
    virtual_pipeline: Size = 1
    """Model chunks per pipeline rank (interleaved schedule); 1 = plain 1F1B."""
    context: Size = 1
    """Context-parallel size: each sequence is split over this many processes."""
    expert: Size = 1
    """Expert-parallel size: the experts of each layer are spread over this many processes, taken
    from the data, context (and tensor) ranks."""
    expert_tensor: Count = 0
    """Tensor-parallel size inside an expert; 0 = parallel.tensor.

    1 keeps experts whole, which suits many small ones (needs expert > 1)."""
    sequence: bool = False
    """Sequence parallelism: split norms and residuals over the tensor group (needs tensor > 1)."""
    distributed_optimizer: bool = False
    """Shard optimizer state (and fp32 main weights) over the data-parallel ranks."""
    overlap_grad_reduce: bool | Literal["auto"] = "auto"
    """Reduce gradients while backward still runs; auto: on GPUs, where several ranks add theirs."""
    overlap_param_gather: bool | Literal["auto"] = "auto"
    """Gather updated weights while the next forward runs (needs distributed_optimizer and
    overlap_grad_reduce); auto: on GPUs, where both are on."""
