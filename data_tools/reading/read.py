"""Documents one after another in this process, for programs that read text but make no corpus."""

from __future__ import annotations

import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence

from data_tools.reading.blocks import Block, BlockReader, Record
from data_tools.reading.documents import Document, Reject
from data_tools.reading.inputs import find_files, plan_units, shard_of
from data_tools.reading.streams import blocks_of_units

GIANT = "too large to hold in memory"
"""The reason under which giant documents, which only preprocess can take, are counted."""


def read_documents(
    inputs: Sequence[str],
    keys: Sequence[str] = ("text",),
    *,
    separator: str = "\n\n",
    file_format: str = "auto",
    include: Sequence[str] = (),
    rank: int = 0,
    world_size: int = 1,
    rejects: Counter | None = None,
) -> Iterator[Document]:
    """The usable documents of the inputs, in order; the others are counted by reason in `rejects`.

    With `world_size` > 1 only the part that belongs to `rank`: the parts of all ranks, in order,
    are the whole.
    """
    units = plan_units(find_files(inputs, file_format, include))
    if world_size > 1:
        units = shard_of(units, rank, world_size)
    with tempfile.TemporaryDirectory(prefix="slm-read-") as spool_folder:
        yield from _documents(
            blocks_of_units(units, spool_folder=spool_folder),
            BlockReader(keys, separator),
            inputs,
            Counter() if rejects is None else rejects,
        )


def _documents(
    blocks: Iterator[Block], reader: BlockReader, inputs: Sequence[str], rejects: Counter
) -> Iterator[Document]:
    path = ""
    lines_before = 0
    for block in blocks:
        if block.unit.files[0].path != path:
            path = block.unit.files[0].path
            lines_before = 0
        for record in reader.read(block):
            if not isinstance(record, Record):
                rejects[record.reason if isinstance(record, Reject) else GIANT] += 1
                continue
            place = f"{record.path}:{lines_before + record.line}" if record.line else record.path
            yield Document(record.text, place, inputs[block.unit.source])
        lines_before += reader.lines


def total_input_bytes(
    inputs: Sequence[str], file_format: str = "auto", include: Sequence[str] = ()
) -> int:
    """Size of the inputs; a compressed file counts four times its size, as text commonly does."""
    return sum(
        file.size_bytes * (4 if file.compression else 1)
        for file in find_files(inputs, file_format, include)
    )
