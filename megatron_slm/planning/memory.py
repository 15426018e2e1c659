"""Memory of one rank by part.

The formulas are for this code: megatron-core's DistributedDataParallel with fp32 gradient buffers,
mixed-precision AdamW, our layers, our head. Activations after Korthikanti et al. (arXiv
2205.05198), adapted to the parts of our models, grouped queries and attention that keeps no [s, s]
matrix.

H hidden, F feed-forward, a query heads, g key/value heads, d head size, t tensor ranks, c context
ranks, q = t with sequence parallelism, else 1; n tokens of a micro-batch on this rank; w bytes of
an activation.
"""

from dataclasses import dataclass, fields

from megatron_slm.config.schema import ModelConfig
from megatron_slm.planning.head import head_memory
from megatron_slm.planning.job import Job, head_size, query_groups
from megatron_slm.planning.parameters import stage_parameters

CONTEXT_BYTES = 2 << 30
"""CUDA context, cuBLAS workspaces and NCCL's buffers of several groups: an allowance, not a
measurement."""
USABLE_FRACTION = 0.95
"""Of the data sheet's memory; the rest for the allocator's fragments. An allowance too."""


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank of one pipeline stage at the peak of a step."""

    weights: int
    gradients: int
    optimizer: int
    activations: int
    """Saved for backward, of all micro-batches in flight."""
    working: int
    """One layer's backward, and with full recomputation the layer computed again."""
    head: int
    reference: int
    """Weights of an online reference."""
    communication: int
    context: int

    @property
    def total(self) -> int:
        return sum(getattr(self, field.name) for field in fields(self))


def rank_memory(job: Job, stage: int) -> RankMemory:
    """The peak of a rank of a stage: backward of its oldest micro-batch, the others in flight."""
    parallel = job.config.parallel
    state = state_bytes(job, stage)
    last = stage == parallel.pipeline - 1
    head = head_memory(job) if last else None
    chunks = chunks_in_flight(job, stage)
    layers_of_chunk = job.stage_layers / parallel.virtual_pipeline
    saved = layer_bytes(job) * layers_of_chunk * chunks + window_mask_bytes(job)
    if last and job.config.model.recompute != "full":
        # With full recomputation it is released before the first layer is computed again, which
        # takes more.
        saved += final_norm_bytes(job)
    reference = 0
    if job.online_reference:
        held = stage_parameters(job, stage, job.reference_model)
        reference = held.total * job.weight_bytes
    return RankMemory(
        *state,
        activations=int(saved),
        working=working_bytes(job),
        head=head.kept_bytes + head.scratch_bytes if head else 0,
        reference=reference,
        communication=communication_bytes(job) + boundary_bytes(job) * chunks,
        context=CONTEXT_BYTES if job.fused else 0,
    )


def boundary_bytes(job: Job) -> int:
    """The received input and the sent output that the schedule holds of every chunk in flight."""
    if job.config.parallel.pipeline == 1:
        return 0
    width = job.config.model.hidden_size * job.weight_bytes
    return 2 * job.rank_tokens * width // job.sequence_split


def state_bytes(job: Job, stage: int) -> tuple[int, int, int]:
    """(weights, gradients, optimizer).

    bf16: 2 bytes a weight, 4 of its gradient, 12 of optimizer: fp32 weight and two moments. fp32:
    4, 4 and 8. The distributed optimizer spreads the optimizer's part over data x context ranks,
    that of experts over the ranks that hold the same ones; megatron-core pads its buffers by less
    than 1 % more.
    """
    held = stage_parameters(job, stage)
    each = 8 if job.config.device.precision == "fp32" else 12
    dense, experts = held.dense * each, held.experts * each
    if job.config.parallel.distributed_optimizer:
        dense = -(-dense // (job.data_parallel * job.config.parallel.context))
        experts = -(-experts // job.expert_data_parallel)
    return held.total * job.weight_bytes, held.total * 4, dense + experts


def chunks_in_flight(job: Job, stage: int) -> int:
    """Model chunks whose activations a rank holds at most.

    1F1B: pp - stage micro-batches. Interleaved over v chunks: 2(pp - stage - 1) + (v - 1)pp + 1
    chunks (megatron-core's warm-up, and one).
    """
    pipeline, virtual = job.config.parallel.pipeline, job.config.parallel.virtual_pipeline
    if virtual == 1:
        return min(pipeline - stage, job.micro_batches)
    return min(
        2 * (pipeline - stage - 1) + (virtual - 1) * pipeline + 1, job.micro_batches * virtual
    )


def layer_bytes(job: Job, recompute: str | None = None) -> float:
    """Saved for backward by one layer for one micro-batch.

    full: the layer's input, n·H·w / q. none: n times
      norms        2 · H · (input + output) / q     input: w; an fp32 copy in torch's own RMSNorm
                   (device.fused_layers: none); output: w. With a parallel residual both LayerNorms
                   (and the fused RMSNorms) keep the same input. Norms on the outputs of attention
                   and of the feed-forward layer instead: the same, their input and that of the
                   products. Norms in both places: 2 · H · input / q more
      q, k, v      ((a + 2g)d + (a + g)d) · w / t   the projection (values are a view of it),
                   queries and keys after rotation. Torch-native layers with fused passes and no
                   norms of queries and keys keep (a + 2g)d alone: values are copied out. Learned
                   positions rotate nothing
      attention    (a·d·w + 4a) / t                 its output, and one fp32 log-sum-exp per head
      feed-forward 3F · w / t                       gate and up, and their product; 5F where SwiGLU
                   is not one pass, 2F without a gate
    selective: the attention core's q, k, v and its output, but not its log-sum-exp: with attention
    that keeps no [s, s] matrix that saves next to nothing. On a CPU (not `fused`) torch's RMSNorm
    keeps its normalised input too (4 more bytes). Under context
    parallelism the torch-native attention holds keys and values of the whole sequence, and its
    output twice.
    """
    model, width, tokens = job.config.model, job.weight_bytes, job.rank_tokens
    recompute = recompute or model.recompute
    if recompute == "full":
        return tokens * model.hidden_size * width / job.sequence_split
    feed_forward = 0
    if not model.experts:
        feed_forward = feed_forward_values(job) * model.ffn_hidden_size * width
    per_tensor_rank = attention_bytes_per_token(job, recompute) + feed_forward
    inputs = 1 if model.parallel_residual and norm_input_bytes(job) == width else 2
    inputs = 4 if model.norm_placement == "both" else inputs
    norms = model.hidden_size * (inputs * norm_input_bytes(job) + 2 * width)
    # One byte of mask per value, twice a layer.
    dropped = 2 * model.hidden_size if model.dropout else 0
    experts = expert_bytes_per_token(job) if model.experts else 0
    # torch's attention keeps a mask as a bias per query and key, whole on every tensor rank;
    # recomputed, it keeps none.
    masked = mask_columns(job) * width if recompute == "none" else 0
    return tokens * (
        masked
        + (norms + dropped + experts) / job.sequence_split
        + per_tensor_rank / job.config.parallel.tensor
    )


def feed_forward_values(job: Job) -> int:
    """Values per feed-forward channel that a dense layer saves: what goes into the activation, what
    comes out of it, and without one pass for SwiGLU also both factors of the gate's product.
    """
    model = job.config.model
    if not model.gated_feed_forward:
        return 2
    return 3 if job.fused and model.activation == "silu" else 5


def mask_columns(job: Job) -> float:
    """Keys per query in the masks that the torch-native attention is given, a mean over layers.

    A mask of documents is over the whole sequence; in a layer with a window of W tokens over the W
    queries of a block and the at most 2W - 1 keys that they see.
    """
    if not job.isolated_documents:
        return 0
    length = job.config.data.sequence_length
    block = min(2 * job.config.model.attention_window_tokens - 1, length)
    windowed = windowed_fraction(job)
    return (1 - windowed) * length + windowed * block


def windowed_fraction(job: Job) -> float:
    """The fraction of the layers whose window is shorter than the sequence, where the torch-native
    attention computes them.
    """
    model, length = job.config.model, job.config.data.sequence_length
    if job.transformer_engine or not 0 < model.attention_window_tokens < length:
        return 0.0
    return 1 - len(model.full_attention_layers) / model.layers


def window_mask_bytes(job: Job) -> int:
    """The one mask of a window's blocks that all layers share."""
    window = job.config.model.attention_window_tokens
    return window * (2 * window - 1) * job.weight_bytes if windowed_fraction(job) else 0


def expert_bytes_per_token(job: Job) -> float:
    """What the mixture of experts saves for one token, with the load spread evenly.

    The rank of a busier expert holds more. For each of its k experts: the row that is sent there
    (on every rank the expert is split over), 3F as in a dense layer (on a CPU 6F: the router's
    weight multiplies one more result), 36 bytes of places and weights. For the router 9 bytes per
    expert: probabilities twice, a mask.
    """
    model, width = job.config.model, job.weight_bytes
    row = model.hidden_size * width * job.expert_tensor
    feed_forward = (3 if job.fused else 6) * model.ffn_hidden_size * width
    return model.experts_per_token * (row + feed_forward + 36) + 9 * model.experts


def attention_bytes_per_token(job: Job, recompute: str) -> float:
    """What one token's attention saves, before division by the tensor ranks."""
    model, width, context = job.config.model, job.weight_bytes, job.config.parallel.context
    heads, groups, size = model.attention_heads, query_groups(model), head_size(model)
    projection = (heads + 2 * groups) * size * width
    rotated = (heads + groups) * size * width if model.position_embedding == "rope" else 0
    whole_heads = model.position_embedding == "rope" and model.rope_fraction == 1
    if job.fused_passes and whole_heads and not model.qk_norm:
        projection = groups * size * width
    output = heads * size * width
    lse = 4 * heads if recompute == "none" else 0
    normed = (heads + groups) * size * qk_norm_input_bytes(job) if model.qk_norm else 0
    if context > 1 and not job.transformer_engine:
        if recompute == "none":
            whole_sequence = 2 * context * groups * size * width
            return normed + heads * size * width + whole_sequence + 2 * output + lse
        return normed + projection + rotated + output
    if recompute == "none":
        # The output of the blocks, and the whole put together.
        return normed + projection + rotated + output * (1 + windowed_fraction(job)) + lse
    return normed + projection + rotated + output


def norm_input_bytes(job: Job) -> int:
    """Bytes per value that a norm saves beside its output."""
    layer_norm = job.config.model.normalization == "layernorm"
    if job.transformer_engine or job.fused_passes or layer_norm:
        return job.weight_bytes
    return 4 if job.fused else 8


def qk_norm_input_bytes(job: Job) -> int:
    """The same of a norm of queries or keys: of all heads over tensor ranks, ops.split_rms_norm."""
    split = job.config.model.qk_norm_over == "all_heads" and job.config.parallel.tensor > 1
    return job.weight_bytes if split else norm_input_bytes(job)


def final_norm_bytes(job: Job) -> int:
    """Input and output of the last norm; its output is the head's input."""
    width = job.config.model.hidden_size * (norm_input_bytes(job) + job.weight_bytes)
    return job.rank_tokens * width // job.sequence_split


def working_bytes(job: Job) -> int:
    """Backward through one layer: gradients of gate and up (or of up alone) and of the residual
    stream, twice each.

    With full recomputation also the layer that is computed again.
    """
    model: ModelConfig = job.config.model
    experts = model.experts_per_token if model.experts else 1
    widths = 2 if model.gated_feed_forward else 1
    wide = widths * model.ffn_hidden_size * experts // job.config.parallel.tensor
    gradients = 2 * job.rank_tokens * job.weight_bytes * (wide + model.hidden_size)
    again = layer_bytes(job, "none") if model.recompute == "full" else 0
    return int(gradients + again)


def communication_bytes(job: Job) -> int:
    """megatron-core's buffers: gathered activations under sequence parallelism, and what two stages
    receive from each other.
    """
    hidden = job.rank_tokens * job.config.model.hidden_size * job.weight_bytes
    gathered = hidden if job.sequence_split > 1 else 0
    return gathered + (2 * hidden // job.sequence_split if job.config.parallel.pipeline > 1 else 0)


def usable_bytes(job: Job) -> float:
    return job.gpu.memory_bytes * USABLE_FRACTION


def fullest_stage(job: Job) -> tuple[int, RankMemory]:
    """The pipeline stage that needs the most, and what it needs."""
    memories = [rank_memory(job, stage) for stage in range(job.config.parallel.pipeline)]
    stage = max(range(len(memories)), key=lambda each: memories[each].total)
    return stage, memories[stage]
