"""The reference model: its identity, read without torch, and its weights in eval mode, in any
parallel layout.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from megatron_slm.checkpoint.folder import CheckpointInfo, read_checkpoint_info, resolve_checkpoint
from megatron_slm.config.schema import Config, DataConfig, DeviceConfig, ParallelConfig
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.tokenization import tokenizer_differences

if TYPE_CHECKING:
    from torch.nn import Module

    from megatron_slm.parallel import Groups


@dataclass(frozen=True)
class Reference:
    """A checkpoint chosen to score tokens; nothing is loaded yet."""

    folder: str
    info: CheckpointInfo

    @property
    def fingerprint(self) -> str:
        """The identity of the weights."""
        return self.info.fingerprint

    @property
    def description(self) -> str:
        return f"{self.folder} (step {self.info.step}, {self.info.tokens_processed:,} tokens)"


def open_reference(checkpoint: str, corpus: CorpusManifest | None) -> Reference:
    """The newest checkpoint at `checkpoint`. ValueError when there is none, or when it was trained
    with another tokenizer than the corpus was made with.

    corpus: None = it could not be opened, and the tokenizers are not compared.
    """
    folder = resolve_checkpoint(checkpoint)
    info = read_checkpoint_info(folder)
    trained_with = {"fingerprint": "unknown", **info.tokenizer}
    if corpus is not None and (
        differences := tokenizer_differences(trained_with, corpus.tokenizer)
    ):
        raise ValueError(
            f"--checkpoint {folder} was trained with the tokenizer {info.tokenizer.get('path')}, "
            f"the corpus was made with {corpus.tokenizer['path']}: {'; '.join(differences)}. "
            "Preprocess the text with the reference's tokenizer."
        )
    return Reference(str(folder), info)


def scoring_config(
    reference: Reference, window_tokens: int, parallel: ParallelConfig, device: DeviceConfig
) -> Config:
    """The Config that builds this reference for windows of `window_tokens` tokens, without dropout
    and recomputation.
    """
    return Config(
        model=reference.info.reference_model(),
        parallel=parallel,
        device=device,
        data=DataConfig(sequence_length=window_tokens),
    )


def load_scoring_model(reference: Reference, config: Config, groups: Groups) -> list[Module]:
    """The model chunks of this rank, weights loaded, in eval mode. Every rank calls it.

    Without dropout, as docs/method.md#point-18 requires.
    """
    from megatron_slm.checkpoint.weights import load_weights
    from megatron_slm.model.build import build_model

    models = build_model(config, reference.info.model["vocabulary_size"], groups, trainable=False)
    load_weights(models, reference.folder, groups)
    return models
