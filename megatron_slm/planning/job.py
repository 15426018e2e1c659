"""One planned job: a configuration, a machine, and the sizes that follow from the two."""

from dataclasses import dataclass
from functools import cached_property

from megatron_slm.config.architecture import has_auxiliary_losses
from megatron_slm.config.layer_engine import torch_only_settings
from megatron_slm.config.schema import Config, ModelConfig
from megatron_slm.config.sizes import (
    data_parallel_size,
    padded_vocabulary_size,
    tokens_per_step,
    train_steps,
)
from megatron_slm.planning.efficiency import TORCH_NATIVE, TRANSFORMER_ENGINE, Efficiency
from megatron_slm.planning.hardware import GPU
from megatron_slm.selection.populations import population_sequences
from megatron_slm.selection.rules import ChoiceRules, configured_scorer
from megatron_slm.selection.schedule import build_schedule


@dataclass(frozen=True)
class Job:
    """The job that is planned. `n` in the formulas of this package is `rank_tokens`."""

    config: Config
    vocabulary_size: int
    """True size: the configuration's, or the tokenizer's."""
    gpu: GPU
    nodes: int = 1
    gpus_per_node: int = 8
    stated_efficiency: float | None = None
    """Share of the peak while a rank computes; bubbles and waiting for other ranks come on top.
    None: the share that was measured with these layers."""
    fused: bool = True
    """Transformer Engine's layers (or, with device.layers torch, the fused passes, or
    torch's fused norm and megatron-core's fused SwiGLU): any GPU. False: a CPU."""
    reference: ModelConfig | None = None
    """The reference model where it is not the trained one's shape."""
    corpus_tokens: int = 0
    """Tokens of the training corpora; 0 = those of the run."""

    @property
    def ranks(self) -> int:
        return self.nodes * self.gpus_per_node

    @property
    def data_parallel(self) -> int:
        return data_parallel_size(self.config, self.ranks)

    @property
    def micro_batches(self) -> int:
        """Micro-batches of one data-parallel rank per step."""
        return self.config.data.global_batch_size // (
            self.config.data.micro_batch_size * self.data_parallel
        )

    @property
    def rank_tokens(self) -> int:
        """Tokens of one micro-batch on one context-parallel rank."""
        return (
            self.config.data.micro_batch_size
            * self.config.data.sequence_length
            // self.config.parallel.context
        )

    @property
    def sequence_split(self) -> int:
        """Ranks over which sequence parallelism spreads norms and residuals."""
        return self.config.parallel.tensor if self.config.parallel.sequence else 1

    @property
    def weight_bytes(self) -> int:
        """Bytes of one weight or activation."""
        return 4 if self.config.device.precision == "fp32" else 2

    @property
    def head_columns(self) -> int:
        """True vocabulary columns of the fullest tensor rank."""
        return min(
            self.vocabulary_size,
            padded_vocabulary_size(self.config, self.vocabulary_size)
            // self.config.parallel.tensor,
        )

    @property
    def expert_tensor(self) -> int:
        """Tensor ranks inside an expert."""
        return self.config.parallel.expert_tensor or self.config.parallel.tensor

    @property
    def expert_data_parallel(self) -> int:
        """Ranks that hold the same experts: their gradients are summed, their optimizer state is
        shared out.
        """
        return self.ranks // (
            self.expert_tensor * self.config.parallel.expert * self.config.parallel.pipeline
        )

    @property
    def stage_layers(self) -> int:
        return self.config.model.layers // self.config.parallel.pipeline

    @property
    def transformer_engine(self) -> bool:
        usable = self.fused and self.config.device.layers != "torch"
        return usable and not torch_only_settings(self.config)

    @property
    def fused_passes(self) -> bool:
        """Torch-native layers whose norms, SwiGLU and rotary embedding are one Triton pass each."""
        return (
            self.fused and not self.transformer_engine and self.config.device.fused_layers == "auto"
        )

    @property
    def efficiency(self) -> Efficiency:
        """What the prediction of times takes."""
        if self.stated_efficiency is not None:
            return Efficiency(training=self.stated_efficiency, forward=self.stated_efficiency)
        return TRANSFORMER_ENGINE if self.transformer_engine else TORCH_NATIVE

    @property
    def isolated_documents(self) -> bool:
        """Attention takes a mask of documents, which the torch-native layers alone do."""
        return self.config.data.document_policy == "isolated"

    @property
    def trained_fraction(self) -> float:
        """Largest share of the tokens whose loss has a gradient; of a schedule, its last value."""
        keep_fraction = build_schedule(self.config.selection.keep_fraction).end
        return self.rules.scorer.kept_fraction_at_most(keep_fraction)

    @cached_property
    def rules(self) -> ChoiceRules:
        """The rules of the configured selection, which training uses too."""
        selection = self.config.selection
        scorer = configured_scorer(selection.scorer, selection.scorer_options, selection.clm_weight)
        return ChoiceRules(scorer, selection.scope, selection.head_rows)

    @property
    def competing_tokens(self) -> int:
        """Tokens of the population that one choice is made in."""
        data = self.config.data
        sequences = population_sequences(
            self.config.selection.scope,
            micro_batch_size=data.micro_batch_size,
            data_parallel_size=self.data_parallel,
            global_batch_size=data.global_batch_size,
        )
        return sequences * data.sequence_length

    @property
    def reference_model(self) -> ModelConfig:
        return self.reference or self.config.model

    @property
    def online_reference(self) -> bool:
        return self.config.selection.reference.checkpoint is not None

    @property
    def scores_before_backward(self) -> bool:
        """Whether every step runs the model forward once more to know all losses first."""
        ahead = has_auxiliary_losses(self.config.model)
        return self.rules.runs_forward_first(weight_needed_ahead=ahead)

    @property
    def epochs(self) -> float | None:
        """Passes over the training corpora; None when their size is not known."""
        run_tokens = self.steps * self.step_tokens
        return run_tokens / self.corpus_tokens if self.corpus_tokens else None

    @property
    def step_tokens(self) -> int:
        return tokens_per_step(self.config)

    @property
    def steps(self) -> int:
        return train_steps(self.config)


def head_size(model: ModelConfig) -> int:
    return model.head_size or model.hidden_size // model.attention_heads


def query_groups(model: ModelConfig) -> int:
    return model.query_groups or model.attention_heads
