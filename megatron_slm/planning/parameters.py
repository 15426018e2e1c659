"""Parameters of the decoder, whole and per rank.

They are those of the tensors that model/build.py makes; tests hold the two together.
"""

from dataclasses import dataclass

from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.config.sizes import padded_vocabulary_size
from megatron_slm.planning.flops import feed_forward_products
from megatron_slm.planning.job import Job, head_size, query_groups


@dataclass(frozen=True)
class Parameters:
    """Counts of one rank, or of the whole model."""

    embedding: int
    layers: int
    final_norm: int
    head: int
    """0 where the output weight is the embedding itself; with tied embeddings and pipeline stages
    the last stage has a copy."""

    experts: int = 0
    """Experts of all layers; on a rank its own, in the whole model all of them. Not in `layers`."""
    positions: int = 0
    """The table of learned positions."""

    @property
    def total(self) -> int:
        embeddings = self.embedding + self.positions
        return embeddings + self.layers + self.final_norm + self.head + self.experts

    @property
    def dense(self) -> int:
        """Those whose gradients are summed over data x context ranks."""
        return self.total - self.experts


def layer_parameters(model: ModelConfig, tensor: int = 1) -> int:
    """One layer on one of t = `tensor` ranks.

    H hidden, a query heads, g key/value heads, d head size, F feed-forward, v values of a norm per
    channel (1; LayerNorm's weight and bias 2): queries, keys, values (a + 2g)d·H / t, output
    a·d·H / t, gate and up 2F·H / t (without a gate F·H / t), down F·H / t; two norms of vH on every
    rank (four with norm_placement both) and 2vd of queries and keys, or (a + g)d / t with
    qk_norm_over all_heads. Biases as configured: (a + 2g)d / t of queries, keys and values, 2F / t
    (F / t) of gate and up, and on every rank H each of attention's output and of down. With E
    experts the router's E·H stands in the place of the feed-forward layer; expert_parameters counts
    the experts.
    """
    hidden, size, groups = model.hidden_size, head_size(model), query_groups(model)
    projected = (model.attention_heads + 2 * groups) * size
    split = projected * hidden + model.attention_heads * size * hidden
    whole = model.experts * hidden
    if not model.experts:
        split += feed_forward_products(model) * model.ffn_hidden_size * hidden
    if model.qkv_bias:
        split += projected
    if model.attention_output_bias:
        whole += hidden
    if model.feed_forward_bias:
        split += (feed_forward_products(model) - 1) * model.ffn_hidden_size
        whole += hidden
    norms = norm_parameters(model, (4 if model.norm_placement == "both" else 2) * hidden)
    if model.qk_norm and model.qk_norm_over == "all_heads":
        split += (model.attention_heads + groups) * size
    elif model.qk_norm:
        norms += norm_parameters(model, 2 * size)
    return split // tensor + whole + norms


def norm_parameters(model: ModelConfig, channels: int) -> int:
    """A weight for every channel, and with LayerNorm a bias."""
    return (2 if model.normalization == "layernorm" else 1) * channels


def expert_parameters(model: ModelConfig, ranks: int = 1) -> int:
    """All experts of one layer, SwiGLU each, spread over expert x expert-tensor ranks: E·3F·H."""
    return model.experts * 3 * model.ffn_hidden_size * model.hidden_size // ranks


def active_parameters(job: Job) -> int:
    """Parameters that are used for one token: of the experts, those it is sent to."""
    model, whole = job.config.model, model_parameters(job)
    if not model.experts:
        return whole.dense
    return whole.dense + whole.experts * model.experts_per_token // model.experts


def stage_parameters(job: Job, stage: int, model: ModelConfig | None = None) -> Parameters:
    """What a rank of pipeline stage `stage` holds of the trained model.

    model: another one in the same layout, a reference.
    """
    model = model or job.config.model
    parallel = job.config.parallel
    rows = padded_vocabulary_size(job.config, job.vocabulary_size) // parallel.tensor
    vocabulary = rows * model.hidden_size
    layers = model.layers // parallel.pipeline
    first, last = stage == 0, stage == parallel.pipeline - 1
    return Parameters(
        embedding=vocabulary if first else 0,
        layers=layers * layer_parameters(model, parallel.tensor),
        final_norm=norm_parameters(model, model.hidden_size) if last else 0,
        head=vocabulary if last and not (model.tied_embeddings and first) else 0,
        experts=layers * expert_parameters(model, parallel.expert * job.expert_tensor),
        positions=model.learned_positions * model.hidden_size if first else 0,
    )


def model_parameters(job: Job, model: ModelConfig | None = None) -> Parameters:
    """The whole model as a checkpoint holds it: each parameter once, padded rows included."""
    return parameters_of_model(job.config, job.vocabulary_size, model)


def parameters_of_model(
    config: Config, vocabulary_size: int, model: ModelConfig | None = None
) -> Parameters:
    """As `model_parameters`, of a configuration alone; vocabulary_size is the true one."""
    model = model or config.model
    rows = padded_vocabulary_size(config, vocabulary_size) * model.hidden_size
    return Parameters(
        embedding=rows,
        layers=model.layers * layer_parameters(model),
        final_norm=norm_parameters(model, model.hidden_size),
        head=0 if model.tied_embeddings else rows,
        experts=model.layers * expert_parameters(model),
        positions=model.learned_positions * model.hidden_size,
    )
