"""Which checkpoints are kept: the newest, every n-th step for good, and the best by validation
loss. No torch.
"""

import math
import shutil
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.checkpoint.folder import complete_checkpoints, point_to, step_of
from megatron_slm.files.plain import read_json_object


@dataclass(frozen=True)
class Retention:
    """Rules of one run. The validation losses are read from the checkpoints, so a resumed run knows
    them too.
    """

    keep_last: int = 3
    """Newest checkpoints kept; 0 = all."""
    keep_every_steps: int = 0
    """Checkpoints at multiples of this are kept for good; 0 = none."""
    keep_best: int = 0
    """Checkpoints kept with the lowest loss of `validation`."""
    validation: str = ""
    """Name of the validation corpus that decides."""

    def apply(self, checkpoints: Path) -> list[Path]:
        """Let `best` name the best checkpoint, then remove those that no rule keeps; returns them.

        OSError when storage fails.
        """
        best = by_validation_loss(checkpoints, self.validation)[: self.keep_best]
        if best:
            point_to(best[0], "best")
        else:
            (checkpoints / "best").unlink(missing_ok=True)
        return remove_old(
            checkpoints, self.keep_last, self.keep_every_steps, {step_of(path) for path in best}
        )


def by_validation_loss(checkpoints: Path, validation: str) -> list[Path]:
    """Complete checkpoints validated at their own step, lowest loss first; of equal losses the
    older checkpoint first.
    """
    ranked = []
    for path in complete_checkpoints(checkpoints):
        try:
            losses = read_json_object(path, "model.json").get("validation_loss", {})
        except ValueError:  # unreadable model.json: loading reports the damage
            continue
        loss = losses.get(validation, math.nan)
        if math.isfinite(loss):
            ranked.append((loss, step_of(path), path))
    return [path for _, _, path in sorted(ranked)]


def remove_old(
    checkpoints: Path, keep_last: int, keep_every_steps: int, keep_best: Collection[int] = ()
) -> list[Path]:
    """Remove checkpoints beyond the newest `keep_last` (0 = keep all); returns them.

    Steps that are multiples of keep_every_steps, or in `keep_best`, are kept.
    """
    if not keep_last:
        return []
    old = complete_checkpoints(checkpoints)[:-keep_last]
    old = [
        path
        for path in old
        if not (keep_every_steps and step_of(path) % keep_every_steps == 0)
        and step_of(path) not in keep_best
    ]
    for path in old:
        # Renamed first: a half-removed folder never has the name of a checkpoint.
        hidden = path.with_name(f".removing_{path.name}")
        path.rename(hidden)
        shutil.rmtree(hidden, ignore_errors=True)
    return old
