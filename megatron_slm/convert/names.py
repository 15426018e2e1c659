"""Our tensors under Hugging Face's names and the other way round, by the table of a family."""

import re
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

from megatron_slm.convert.families.family import Family
from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.table import entries
from megatron_slm.convert.transforms import VOCABULARY

EMBEDDING, HEAD = "embedding.word_embeddings.weight", "output_layer.weight"


def to_huggingface(
    state: Mapping[str, Tensor], geometry: Geometry, family: Family
) -> Iterator[tuple[str, Tensor]]:
    """Our whole tensors under Hugging Face's names, one at a time, so that `state` may read them
    from disk lazily.

    ValueError when `state` has other names than the model's or a tensor of another shape (rows of
    vocabulary padding excepted).
    """
    table = entries(geometry, family.table)
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

    ValueError (on construction, before any tensor is read) for missing or unknown names and for
    tensors of another shape than the model's, and for a head beside tied embeddings that is not
    equal to them. Buffers that older exports carry along (rotary inv_freq, and the copy of a tied
    head) are derived from the rest and passed over.

    family: whose table is read. their_shapes: the shape of each tensor in `theirs`; None = they are
    in memory, and asked.
    """

    def __init__(
        self,
        theirs: Mapping[str, Tensor],
        geometry: Geometry,
        family: Family,
        their_shapes: Mapping[str, tuple[int, ...]] | None = None,
    ):
        self.entries = {entry.ours: entry for entry in entries(geometry, family.table)}
        self._theirs = theirs
        self._geometry = geometry
        self._stored = {family.table_name(name): name for name in theirs}
        if len(self._stored) < len(theirs):
            twice = {*theirs} - {*self._stored.values()}
            raise ValueError(
                f"the Hugging Face folder has {_some(twice)} under another name too: keep one"
            )
        names = {row.ours: row.theirs for row in family.table}
        tied_heads = names[HEAD] if geometry.tied else ()
        derived = re.compile(family.derived)
        got = {
            name for name in self._stored if not derived.fullmatch(name) and name not in tied_heads
        }
        expected = {name for entry in self.entries.values() for name in entry.theirs}
        check_names(got, expected, "the Hugging Face folder")
        if their_shapes is None:
            their_shapes = {name: tuple(tensor.shape) for name, tensor in theirs.items()}
        self._check_shapes(their_shapes)
        for head, embedding in zip(tied_heads, names[EMBEDDING], strict=False):
            if head in self._stored:
                _check_tied_head(theirs, self._stored[head], self._stored[embedding])

    def _check_shapes(self, got: Mapping[str, tuple[int, ...]]) -> None:
        wrong = []
        for entry in self.entries.values():
            for name, shape in zip(entry.theirs, entry.their_shapes, strict=True):
                stored = self._stored[name]
                if got[stored] != shape:
                    wrong.append(f"{stored} has shape {got[stored]}, its config.json says {shape}")
        if wrong:
            more = f"; and {len(wrong) - 4} more" if len(wrong) > 4 else ""
            raise ValueError("; ".join(wrong[:4]) + more)

    def __getitem__(self, ours: str) -> Tensor:
        entry = self.entries[ours]
        theirs = [self._theirs[self._stored[name]] for name in entry.theirs]
        return entry.transform.join(theirs, self._geometry)

    def __iter__(self) -> Iterator[str]:
        return iter(self.entries)

    def __len__(self) -> int:
        return len(self.entries)


def _check_tied_head(theirs: Mapping[str, Tensor], head: str, embedding: str) -> None:
    """ValueError when a head is stored beside the embeddings it is said to be tied to, and differs.

    Versions of transformers differ in which of the two they use.
    """
    if not torch.equal(theirs[head], theirs[embedding]):
        raise ValueError(
            f"tie_word_embeddings is true, but {head} is stored and differs from {embedding}: set "
            "tie_word_embeddings to false in config.json to keep that head, or take the tensor out"
        )


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
