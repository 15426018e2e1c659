"""What --model_args of our model in lm-evaluation-harness may hold, checked without torch."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, cast

from megatron_slm.config.architecture import ROPE_BY_LENGTH
from megatron_slm.config.check import check_config
from megatron_slm.config.load import ConfigError, from_mapping
from megatron_slm.config.ranges import Count, Size, out_of_range
from megatron_slm.config.schema import Config, DeviceConfig, ParallelConfig
from megatron_slm.scoring.options import Precision
from megatron_slm.scoring.reference import Reference, open_reference, scoring_config
from megatron_slm.tokenization import Tokenizer, load_tokenizer, tokenizer_differences

MODEL_NAME = "megatron_slm"


@dataclass
class HarnessSettings:
    """The arguments of `--model megatron_slm`."""

    checkpoint: str
    """A run folder (its newest checkpoint), or one step_* folder."""
    tokenizer: str = ""
    """The checkpoint's tokenizer, where it is no longer at the path that the checkpoint names."""
    max_length: Count = 0
    """Tokens that are read at once; 0 = the length the checkpoint was trained with."""
    max_gen_toks: Size = 256
    """New tokens of a generated text, where the task does not say."""
    batch_size: Size = 1
    """Sequences per forward pass."""
    precision: Precision = "checkpoint"
    """Of the weights; checkpoint = as it was trained."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """auto = the GPU of each process where there is one."""
    tensor: Size = 1
    """Tensor parallelism; of the processes that torchrun starts the others are data-parallel."""
    pipeline: Size = 1
    """Pipeline parallelism."""
    context: Size = 1
    """Context parallelism: each process holds a part of every sequence."""
    expert: Size = 1
    """Expert parallelism: the experts of a mixture are spread over this many processes, taken from
    the data-parallel ones.
    """
    expert_tensor: Count = 0
    """Tensor parallelism inside an expert; 0 = tensor."""
    add_bos_token: Literal["as_trained", "true", "false"] = "as_trained"
    """Whether texts begin with the begin token; as_trained = as the documents of the training
    corpora did.
    """
    prefix_token_id: int | None = None
    """The token before a text without context; none = the begin token, else the end token."""


@dataclass(frozen=True)
class HarnessJob:
    """Checked settings: everything opened, nothing started."""

    settings: HarnessSettings
    config: Config
    checkpoint: Reference
    tokenizer: Tokenizer
    begins_texts: bool
    """Whether the begin token is put before each text."""


def read_settings(arguments: Mapping[str, Any]) -> HarnessSettings:
    """The settings in what the harness hands on. ConfigError with everything wrong or unknown."""
    given = {
        name: value
        for name, value in arguments.items()
        if value is not None and name != "max_batch_size"  # read for batch_size auto alone
    }
    if "add_bos_token" in given:  # the harness reads "true" as True
        given["add_bos_token"] = str(given["add_bos_token"]).lower()
    problems: list[str] = []
    batch_size = given.get("batch_size", 1)
    if not str(batch_size).isdigit():
        problems.append(f"batch_size: got {batch_size}; expected a number, sizes are not tried out")
        given["batch_size"] = 1
    given["batch_size"] = int(given.get("batch_size", 1))
    # The harness' own way to name a GPU; here each process has the one of its LOCAL_RANK.
    given["device"] = str(given.get("device", "auto")).partition(":")[0]
    settings, unreadable = from_mapping(given, HarnessSettings)
    problems += unreadable
    if not unreadable:
        problems += [sentence for _, sentence in out_of_range(settings)]
    if problems:
        raise ConfigError(problems)
    return settings


def prepare(arguments: Mapping[str, Any]) -> HarnessJob:
    """Open the checkpoint and its tokenizer; ConfigError, or ValueError where one is unusable."""
    settings = read_settings(arguments)
    checkpoint = open_reference(settings.checkpoint, None)
    named = settings.precision
    stored = cast(Literal["fp32", "bf16", "fp16"], checkpoint.info.precision)
    device = DeviceConfig(
        kind=settings.device, precision=stored if named == "checkpoint" else named
    )
    parallel = ParallelConfig(
        tensor=settings.tensor,
        pipeline=settings.pipeline,
        context=settings.context,
        expert=settings.expert,
        expert_tensor=settings.expert_tensor,
        sequence=settings.tensor > 1,
    )
    length = settings.max_length or checkpoint.info.sequence_length
    config = scoring_config(checkpoint, length, parallel, device)
    check_config(config, int(os.environ.get("WORLD_SIZE", 1)), training=False)
    refuse_long_rotation(config)
    tokenizer = _tokenizer_of(checkpoint, settings.tokenizer)
    begins = settings.add_bos_token == "true"
    if settings.add_bos_token == "as_trained":
        begins = bool(checkpoint.info.tokenizer.get("prepend_bos"))
    if begins and tokenizer.bos_id is None:
        raise ConfigError([f"add_bos_token: got true, but {tokenizer.path} has no begin token"])
    return HarnessJob(settings, config, checkpoint, tokenizer, begins)


def refuse_long_rotation(config: Config) -> None:
    """ConfigError where short requests would be rotated as long ones."""
    model, length = config.model, config.data.sequence_length
    original = model.rope_original_sequence_length
    if model.rope_scaling in ROPE_BY_LENGTH and length > original:
        raise ConfigError(
            [
                f"max_length: got {length} with model.rope_scaling {model.rope_scaling}; requests "
                f"are of many lengths, and those of up to {original} tokens would be rotated as "
                f"longer ones: give max_length={original}"
            ]
        )


def _tokenizer_of(checkpoint: Reference, given: str) -> Tokenizer:
    trained_with = checkpoint.info.tokenizer
    path = given or str(trained_with.get("path"))
    try:
        tokenizer = load_tokenizer(path)
    except (ValueError, OSError) as error:
        raise ValueError(
            f"the tokenizer of {checkpoint.folder} cannot be read ({error}); name its file: "
            "tokenizer=PATH"
        ) from None
    known = {"fingerprint": "unknown", **trained_with}
    if differences := tokenizer_differences(known, tokenizer.entry):
        raise ValueError(
            f"{checkpoint.folder} was trained with another tokenizer than {path}: "
            f"{'; '.join(differences)}"
        )
    return tokenizer
