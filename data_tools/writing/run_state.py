"""What the parent knows about a run besides the tokens.

Counts per source, which rejects are listed, and the place to continue from.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from data_tools.encoding.block_result import BlockResult
from data_tools.reading.blocks import Block
from data_tools.reading.documents import HARMLESS

REJECTS_LISTED_PER_REASON = 1000


@dataclass
class SourceCounts:
    """What was read through one --input argument."""

    records: int = 0
    documents: int = 0
    tokens: int = 0
    text_bytes: int = 0
    read_bytes: int = 0
    damaged_bytes: int = 0
    fingerprint: str = ""
    """Chained sha256 of the content of its blocks, in order."""
    rejected: dict[str, int] = field(default_factory=dict)
    filtered: dict[str, int] = field(default_factory=dict)


@dataclass
class RunState:
    """Saved with the progress of a run; it depends only on the blocks consumed so far, in order."""

    sources: list[SourceCounts]
    units_done: int = 0
    unit_blocks_done: int = 0
    """Blocks consumed of the unit after those that are done; streams have several."""
    path: str = ""
    """The file of the block consumed last."""
    lines_before: int = 0
    """Lines of `path` in the blocks consumed."""
    counted_from: int = 0
    """Where in `path` this shard began to count lines: a byte, or a row group of parquet.

    0 unless the shard begins inside a file.
    """
    listed: dict[str, int] = field(default_factory=dict)
    """Rejects listed so far, by reason."""

    def to_json(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_json(cls, content: dict[str, Any]) -> RunState:
        content = dict(content)
        return cls(sources=[SourceCounts(**source) for source in content.pop("sources")], **content)

    def consume(self, block: Block, result: BlockResult, duplicates: int) -> list[dict[str, Any]]:
        """Count one block; returns the rejects to list, with line numbers of the file."""
        counts = self.sources[block.unit.source]
        counts.records += result.records
        counts.documents += len(result.lengths_tokens)
        counts.tokens += int(result.lengths_tokens.sum(dtype=np.int64))
        counts.text_bytes += int(result.text_bytes.sum())
        counts.read_bytes += result.read_bytes
        counts.damaged_bytes += result.damaged_bytes
        counts.fingerprint = hashlib.sha256(counts.fingerprint.encode() + result.digest).hexdigest()
        counts.rejected = dict(Counter(counts.rejected) + result.rejects)
        filtered = result.filtered + Counter({"exact duplicate": duplicates} if duplicates else {})
        counts.filtered = dict(Counter(counts.filtered) + filtered)
        return self._rejects_to_list(block, result)

    def _rejects_to_list(self, block: Block, result: BlockResult) -> list[dict[str, Any]]:
        path = block.unit.files[0].path
        if path != self.path:
            self.path = path
            self.lines_before = 0
            self.counted_from = block.unit.start
        listed = []
        for reject in result.reject_samples:
            if self.listed.get(reject.reason, 0) >= REJECTS_LISTED_PER_REASON:
                continue
            self.listed[reject.reason] = self.listed.get(reject.reason, 0) + 1
            entry = reject.to_json()
            if reject.line:
                entry["line"] += self.lines_before
                if self.counted_from:
                    entry["counted_from"] = self.counted_from
            listed.append(entry)
        self.lines_before += result.lines
        return listed

    def finish_block(self, block: Block, last_of_unit: bool) -> None:
        if last_of_unit:
            self.units_done += 1
            self.unit_blocks_done = 0
        else:
            self.unit_blocks_done += 1

    def total(self, name: str) -> int:
        return sum(getattr(source, name) for source in self.sources)

    def rejected(self) -> Counter:
        return sum((Counter(source.rejected) for source in self.sources), Counter())

    def filtered(self) -> Counter:
        return sum((Counter(source.filtered) for source in self.sources), Counter())

    def bad_records(self) -> int:
        return sum(count for reason, count in self.rejected().items() if reason not in HARMLESS)

    def bad_fraction(self, input_bytes: int) -> float:
        """The larger of bad records among records and unread damaged bytes among all bytes."""
        of_records = self.bad_records() / max(self.total("records"), 1)
        return max(of_records, min(1.0, self.total("damaged_bytes") / max(input_bytes, 1)))
