"""Our tensors under Hugging Face's names and the other way round, by the table in table.py."""

import re
from collections.abc import Iterator, Mapping

from torch import Tensor

from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.table import VOCABULARY, entries


def to_huggingface(state: Mapping[str, Tensor], geometry: Geometry) -> Iterator[tuple[str, Tensor]]:
    """Our whole tensors under Hugging Face's names, one at a time, so that `state` may read them
    from disk lazily.

    ValueError when `state` has other names than the model's or a tensor of another shape (rows of
    vocabulary padding excepted).
    """
    table = entries(geometry)
    check_names(set(state), {entry.ours for entry in table}, "the checkpoint")
    for entry in table:
        tensor = state[entry.ours]
        same_rows = entry.transform is VOCABULARY or tensor.shape[0] == entry.shape[0]
        if not same_rows or tuple(tensor.shape[1:]) != entry.shape[1:]:
            raise ValueError(
                f"{entry.ours} has shape {tuple(tensor.shape)}, its model.json says {entry.shape}"
            )
        yield from zip(entry.theirs, entry.transform.split(tensor, geometry), strict=True)


class FromHuggingface(Mapping[str, Tensor]):
    """Hugging Face tensors seen under our names; each is made on access.

    ValueError (on construction) for missing or unknown names. Buffers that older exports carry
    along (rotary inv_freq, and the copy of a tied head) are derived from the rest and passed over.
    """

    def __init__(self, theirs: Mapping[str, Tensor], geometry: Geometry):
        self.entries = {entry.ours: entry for entry in entries(geometry)}
        self._theirs = theirs
        self._geometry = geometry
        derived = re.compile(
            r".*\.rotary_emb\.inv_freq" + (r"|lm_head\.weight" if geometry.tied else "")
        )
        got = {name for name in theirs if not derived.fullmatch(name)}
        expected = {name for entry in self.entries.values() for name in entry.theirs}
        check_names(got, expected, "the Hugging Face folder")

    def __getitem__(self, ours: str) -> Tensor:
        entry = self.entries[ours]
        tensor = entry.transform.join([self._theirs[name] for name in entry.theirs], self._geometry)
        if tuple(tensor.shape) != entry.shape:
            raise ValueError(
                f"{', '.join(entry.theirs)} make {ours} of shape {tuple(tensor.shape)}; "
                f"config.json says {entry.shape}"
            )
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def check_names(got: set[str], expected: set[str], where: str) -> None:
    """ValueError naming what is missing and what is not known."""
    problems = []
    if expected - got:
        problems.append(f"lacks {_some(expected - got)}")
    if got - expected:
        problems.append(f"has {_some(got - expected)}, which this model has no place for")
    if problems:
        raise ValueError(f"{where} does not fit the model's settings: it {'; it '.join(problems)}")


def _some(names: set[str]) -> str:
    shown = sorted(names)[:4]
    return ", ".join(shown) + (f" and {len(names) - 4} more" if len(names) > 4 else "")
