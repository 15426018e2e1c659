"""A model and a reference for an excess loss, and text that neither has seen.

Either small ones that are trained on the spot, or two checkpoints and a corpus. The small pair: a
decoder of random weights trained for some steps on words of Python's standard library, and as
reference the same decoder trained for as many steps more on other files.

W windows, S tokens of a window, B windows of one batch.
"""

from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, cast

import numpy as np
import torch
from torch import Tensor

from benchmarks.library_words import library_tokens
from megatron_slm.config.schema import Config, DeviceConfig, ParallelConfig
from megatron_slm.parallel import Groups

if TYPE_CHECKING:
    from megatron_slm.model.decoder import Decoder

LEARNING_RATE = 1e-3
WARM_UP_FRACTION = 0.1


@dataclass(frozen=True)
class Shape:
    """Sizes of a pair that is trained on the spot."""

    layers: int
    hidden: int
    vocabulary: int
    sequence_tokens: int
    sequences: int
    """Of a step, and of a batch of the measurement."""
    steps: int
    """Of the model; the reference takes as many more."""
    text_tokens: int
    """At most: words of the standard library; a tenth is held out."""
    measured_tokens: int

    @property
    def description(self) -> str:
        return (
            f"{self.layers} layers, H {self.hidden}, {self.steps} steps of "
            f"{self.sequences} x {self.sequence_tokens} words of the Python standard library; "
            f"reference: {self.steps} steps more"
        )


@dataclass(frozen=True)
class Pair:
    """Two models in eval mode with the same vocabulary, and held-out windows."""

    model: "Decoder"
    reference: "Decoder"
    windows_WS: Tensor
    """int64 [W, S + 1], on the device."""
    batch_windows: int
    description: str


def trained_pair(shape: Shape, groups: Groups) -> Pair:
    """Train both; some minutes on a CPU."""
    text = torch.from_numpy(library_tokens(shape.text_tokens, shape.vocabulary))
    cuts = [len(text) * 45 // 100, len(text) * 90 // 100]
    first, second, held_out = (part.to(groups.device) for part in text.tensor_split(cuts))
    model = _fresh(shape, groups)
    _train(model, first, shape)
    reference = _fresh(shape, groups)
    reference.load_state_dict(model.state_dict())
    _train(reference, second, shape)
    windows_WS = _windows(held_out, shape.sequence_tokens, shape.measured_tokens)
    return Pair(model.eval(), reference.eval(), windows_WS, shape.sequences, shape.description)


def checkpoint_pair(
    model: str, reference: str, corpus: str, measured_tokens: int, groups: Groups
) -> Pair:
    """Two checkpoints of this library on the first tokens of a corpus, in packed windows.

    Windows and precision are those that the model was trained with. ValueError where a checkpoint
    does not fit the corpus or the other one.
    """
    from megatron_slm.data.manifest import CorpusManifest
    from megatron_slm.scoring.corpus import TokenStream
    from megatron_slm.scoring.reference import open_reference

    manifest = CorpusManifest.read(corpus)
    opened = [open_reference(folder, manifest) for folder in (model, reference)]
    sizes = [each.info.model["vocabulary_size"] for each in opened]
    if sizes[0] != sizes[1]:
        raise ValueError(
            f"--reference {reference}: got a vocabulary of {sizes[1]}; expected {sizes[0]}, that "
            f"of --model {model}"
        )
    length = opened[0].info.sequence_length
    stream = np.array(TokenStream(corpus).tokens[: measured_tokens + 1]).astype(np.int64)
    if len(stream) <= length:
        raise ValueError(
            f"--corpus {corpus}: got {len(stream)} tokens; expected more than one window of "
            f"{length}"
        )
    windows_WS = _windows(torch.from_numpy(stream).to(groups.device), length, measured_tokens)
    description = " beside ".join(each.description for each in opened)
    loaded = [_load(each, length, groups) for each in opened]
    return Pair(loaded[0], loaded[1], windows_WS, max(1, 2048 // length), description)


def _load(reference, length: int, groups: Groups) -> "Decoder":
    from megatron_slm.scoring.reference import load_scoring_model, scoring_config

    device = DeviceConfig(precision=reference.info.precision, layers="torch")
    config = scoring_config(reference, length, ParallelConfig(), device)
    return _decoder_of(load_scoring_model(reference, config, groups))


def _fresh(shape: Shape, groups: Groups) -> "Decoder":
    # Imports megatron-core, which choose_device must prepare for a CPU first.
    from megatron_slm.model.build import build_model

    config = Config()
    # The passes under test are the head's alone: everything below it is torch's own.
    config.device = DeviceConfig(layers="torch", fused_layers="none")
    config.model.layers = shape.layers
    config.model.hidden_size = shape.hidden
    config.model.ffn_hidden_size = shape.hidden * 8 // 3
    config.data.sequence_length = shape.sequence_tokens
    return _decoder_of(build_model(config, shape.vocabulary, groups))


def _decoder_of(chunks: list) -> "Decoder":
    """The one chunk of a model without pipeline stages, out of its precision wrapper."""
    (chunk,) = chunks
    return cast("Decoder", getattr(chunk, "module", chunk))


def _train(model: "Decoder", text: Tensor, shape: Shape) -> None:
    """Plain CLM by AdamW, windows drawn at random, fp32."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95))
    warm_up_steps = max(1, round(WARM_UP_FRACTION * shape.steps))
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / warm_up_steps)
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(shape.steps):
        starts = torch.randint(
            0, len(text) - shape.sequence_tokens, (shape.sequences,), generator=generator
        )
        batch_BS = torch.stack(
            [text[start : start + shape.sequence_tokens + 1] for start in starts.tolist()]
        )
        optimizer.zero_grad()
        losses_of(model, batch_BS).mean().backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()


def losses_of(model: "Decoder", batch_BS: Tensor) -> Tensor:
    """fp32 [B, S], in nats, of the tokens after the first of each row; batch_BS is [B, S + 1]."""
    tokens_BS, labels_BS = batch_BS[:, :-1], batch_BS[:, 1:]
    positions_BS = torch.arange(tokens_BS.shape[1], device=tokens_BS.device).expand_as(tokens_BS)
    return model(tokens_BS, positions_BS, None, labels=labels_BS).loss_BS


@torch.no_grad()
def operands_of_head(model: "Decoder", batch_BS: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(hidden_NH, weight_VH, target_N) of the head on a batch, rounded to bf16 as in bf16 training.

    weight_VH without rows of padding. N = B x S.
    """
    from megatron_slm.model.decoder import head_weight

    kept: list[Tensor] = []
    hook = model.decoder.register_forward_hook(partial(_keep, kept))
    losses_of(model, batch_BS)
    hook.remove()
    hidden_NH = kept[0].transpose(0, 1).reshape(-1, kept[0].shape[-1]).bfloat16()
    weight_VH = head_weight(model)[: model.vocabulary_size].bfloat16()
    return hidden_NH, weight_VH, batch_BS[:, 1:].reshape(-1)


def _keep(kept: list[Tensor], _: torch.nn.Module, arguments: tuple, hidden_SBH: Tensor) -> None:
    kept.append(hidden_SBH)


def _windows(text: Tensor, length: int, tokens: int) -> Tensor:
    """int64 [W, length + 1]: windows one after the other; the last token of one begins the next."""
    windows_WS = text.unfold(0, length + 1, length)
    return windows_WS[: max(1, tokens // length)].contiguous()
