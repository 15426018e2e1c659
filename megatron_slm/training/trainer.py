"""What a training step uses: models, optimizer, token selector, and an online reference."""

from dataclasses import dataclass, field

from megatron_slm.model.forward_backward import (
    DistributedDataParallel,
    MegatronModule,
    set_extra_outputs,
)
from megatron_slm.model.optimizer import MegatronOptimizer
from megatron_slm.model.router import has_auxiliary_losses
from megatron_slm.parallel import Groups
from megatron_slm.training.token_selector import TokenSelector


@dataclass
class Trainer:
    """One rank's part of everything that a step reads and changes."""

    models: list[DistributedDataParallel]
    optimizer: MegatronOptimizer
    selector: TokenSelector
    groups: Groups
    reference: list[MegatronModule] | None = None
    """Frozen reference models of an online reference, in the same layout."""
    weight_needed_ahead: bool = field(init=False)
    """Whether a step must know its divisor before its first backward: the auxiliary losses of a
    mixture of experts are scaled by it (model/router.py).
    """

    def __post_init__(self) -> None:
        set_extra_outputs(self.models, self.selector.extras)
        self.weight_needed_ahead = has_auxiliary_losses(self.models)

    def end_selection(self, tokens: int) -> None:
        """Train on every token from here on; `tokens` were processed so far.

        The online reference is let go, and steps cost what plain training costs.
        """
        self.selector.end(tokens)
        self.reference = None
        set_extra_outputs(self.models, self.selector.extras)

    @property
    def reference_extras(self) -> tuple[str, ...]:
        """The per-token outputs that the online reference must return beside its loss."""
        return ("entropy",) if "reference_entropy" in self.selector.scorer.needs else ()
