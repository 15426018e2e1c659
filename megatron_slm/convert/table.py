"""A family's table of tensor names, which is read in both directions. No torch.

A row says for one kind of our tensors (tensors.py) which of Hugging Face's it becomes, and how
(transforms.py).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from megatron_slm.convert.geometry import Geometry
from megatron_slm.convert.tensors import OurTensor, our_tensors
from megatron_slm.convert.transforms import SAME, Transform


@dataclass(frozen=True)
class Row:
    """One line of a family's table."""

    ours: str
    """The name of one of tensors.KINDS."""
    theirs: tuple[str, ...]
    """{layer} and {expert} in the names stand for the same numbers as in ours."""
    transform: Transform = SAME


Table = tuple[Row, ...]
"""Rows of tensors that a model has not are passed over."""


def module_rows(ours: str, theirs: str) -> tuple[Row, Row]:
    """The weight and the bias of one module, which are stored as they are here."""
    return Row(f"{ours}.weight", (f"{theirs}.weight",)), Row(f"{ours}.bias", (f"{theirs}.bias",))


def changed(table: Table, *rows: Row) -> Table:
    """`table` with these rows in the place of those of the same tensors, and further ones added."""
    return tuple({row.ours: row for row in (*table, *rows)}.values())


@dataclass(frozen=True)
class Entry:
    """One tensor of one model: its row with the layer and expert numbers filled in."""

    ours: str
    theirs: tuple[str, ...]
    transform: Transform
    shape: tuple[int, ...]
    """Shape of our tensor."""
    their_shapes: tuple[tuple[int, ...], ...]
    """Shape of each of theirs."""


def entries(geometry: Geometry, table: Sequence[Row]) -> list[Entry]:
    """Every tensor of a model, in the order of the network: embedding, layers, head.

    KeyError: the table lacks a tensor of the model, so its family claims too much.
    """
    rows = {row.ours: row for row in table}
    return [_entry(tensor, rows, geometry) for tensor in our_tensors(geometry)]


def _entry(tensor: OurTensor, rows: Mapping[str, Row], geometry: Geometry) -> Entry:
    row = rows[tensor.kind]
    return Entry(
        ours=tensor.name,
        theirs=tuple(name.format(layer=tensor.layer, expert=tensor.expert) for name in row.theirs),
        transform=row.transform,
        shape=tensor.shape,
        their_shapes=row.transform.shapes(tensor.shape, geometry),
    )
