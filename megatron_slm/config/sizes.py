"""Sizes that follow from a configuration and a number of processes."""

import math

from megatron_slm.config.schema import Config, ModelConfig


def model_parallel_size(config: Config) -> int:
    """Processes that hold one copy of the model: tensor * pipeline * context."""
    return config.parallel.tensor * config.parallel.pipeline * config.parallel.context


def data_parallel_size(config: Config, world_size: int) -> int:
    """Processes left for data parallelism: world size / (tensor * pipeline * context)."""
    return world_size // model_parallel_size(config)


def sequence_pieces(tensor: int, context: int) -> int:
    """Equal pieces that a layout cuts a sequence into, so a divisor of its length.

    tensor: the tensor size under sequence parallelism, else 1. Context parallelism takes two pieces
    per rank, one from each half.
    """
    return tensor * (2 * context if context > 1 else 1)


def padded_vocabulary_size(config: Config, vocabulary_size: int) -> int:
    """Rows of the embedding: the vocabulary, rounded up to a multiple of the configured number and
    of the tensor size.

    It is the same for all tensor sizes that divide the configured number. Weights of one seed, and
    checkpoints, then agree between layouts.
    """
    multiple = math.lcm(config.model.pad_vocabulary_to_multiple_of, config.parallel.tensor)
    return -(-vocabulary_size // multiple) * multiple


def rotated_channels(model: ModelConfig) -> int:
    """Channels of each head that the rotary embedding turns, the first ones; 0 without one."""
    if model.position_embedding != "rope":
        return 0
    head_size = model.head_size or model.hidden_size // model.attention_heads
    return int(head_size * model.rope_fraction)  # rounded down, as in transformers, megatron-core


def train_steps(config: Config) -> int:
    """Optimizer steps of the run: train_steps, or train_tokens rounded up to whole steps."""
    return config.schedule.train_steps or -(
        -config.schedule.train_tokens // tokens_per_step(config)
    )


def tokens_per_step(config: Config) -> int:
    """Processed tokens of one optimizer step."""
    return config.data.global_batch_size * config.data.sequence_length
