"""Measurements of outside code at validation, beside the plain loss (monitoring.validations)."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from megatron_slm.data.batch import Batch
from megatron_slm.model.forward_backward import MegatronModule
from megatron_slm.parallel import Groups
from megatron_slm.training.data_fault import DataFault
from megatron_slm.training.evaluate import PLAIN_METRICS, plain_loss


@dataclass(frozen=True)
class ValidationRun:
    """The argument of a function of monitoring.validations, which every rank calls at the same
    step.
    """

    step: int
    models: Sequence[MegatronModule]
    loaders: Mapping[str, Iterable[Sequence[Batch]]]
    """Of each validation corpus: this rank's micro-batches of every global batch."""
    groups: Groups

    @property
    def corpora(self) -> list[str]:
        """Names of the validation corpora."""
        return list(self.loaders)

    def mean_loss(self, corpus: str, chosen: Callable[[Batch], Tensor]) -> float:
        """Mean loss, in nats, of the tokens for which `chosen(batch)` is true, over all ranks.

        chosen: a bool tensor [B, S]. Tokens that do not count (the first of a document, padding)
        are left out. Known on last-stage ranks; NaN on the others and where no token is chosen.
        """
        mean, _ = plain_loss(self.models, self.loaders[corpus], self.groups, chosen)
        return mean


def measure_outside(
    validations: Mapping[str, Callable[[ValidationRun], Mapping[str, Any]]],
    validation: ValidationRun,
) -> dict[str, float]:
    """What every function measures, as validation/<metric>.

    RuntimeError when one fails, or gives a metric that the plain loss or another function gives.
    """
    taken = {f"{corpus}/{metric}" for corpus in validation.corpora for metric in PLAIN_METRICS}
    record = {}
    for name, measure in validations.items():
        try:
            measured = dict(measure(validation))
        except DataFault:  # of a validation corpus, on all ranks: the loop saves, and ends with 3
            raise
        except Exception as error:
            raise RuntimeError(
                f"monitoring.validations: {name} failed at step {validation.step}: "
                f"{type(error).__name__}: {error}"
            ) from error
        if again := sorted(taken & measured.keys()):
            raise RuntimeError(
                f"monitoring.validations: {name} gives validation/{again[0]}, which is measured "
                "already; give it another name"
            )
        taken |= measured.keys()
        for metric, value in measured.items():
            record[f"validation/{metric}"] = value
    return record
