"""One preprocessing run: plan, encode in workers, write in order, publish."""

from __future__ import annotations

import dataclasses
import hashlib
import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from data_tools.encoding.block_result import BlockResult, Part
from data_tools.encoding.pool import ordered_map
from data_tools.encoding.worker import BlockEncoder, EncodeSettings
from data_tools.reading.blocks import Block
from data_tools.reading.documents import HASH_BYTES, InputDataError
from data_tools.reading.inputs import (
    STDIN,
    SourceFile,
    Unit,
    find_files,
    plan_fingerprint,
    plan_units,
    shard_of,
)
from data_tools.reading.streams import blocks_of_units
from data_tools.writing.run_progress import RunProgress, print_summary
from data_tools.writing.run_state import RunState, SourceCounts
from data_tools.writing.statistics_report import statistics_of, write_statistics
from data_tools.writing.writer import CorpusWriter, existing_output
from megatron_slm import __version__
from megatron_slm.data.manifest import FORMAT_VERSION, CorpusManifest, check_corpus, manifest_path
from megatron_slm.files.made_from import refuse_other_origin
from megatron_slm.tokenization import Tokenizer, load_tokenizer

PROGRAM = "data_tools.preprocess"
_HOPELESS_RECORDS = 10_000


@dataclass(frozen=True)
class PreprocessingSettings:
    inputs: tuple[str, ...]
    tokenizer: str
    output_prefix: str
    workers: int
    file_format: str
    include: tuple[str, ...]
    encode: EncodeSettings
    max_bad_fraction: float
    shard: tuple[int, int] | None
    overwrite: bool
    skip_complete: bool
    restart: bool
    save_every_seconds: float
    encoder: str

    @property
    def prefix(self) -> str:
        if self.shard is None:
            return self.output_prefix
        return shard_prefix(self.output_prefix, *self.shard)


def shard_prefix(output_prefix: str, index: int, count: int) -> str:
    return f"{output_prefix}.shard-{index:05d}-of-{count:05d}"


def run(settings: PreprocessingSettings) -> CorpusManifest:
    """Make the corpus and return its manifest. Raises ValueError (usage), InputDataError (bad input), OSError, WorkerDied."""
    prefix = settings.prefix
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(f"{prefix}.partial", "finished.json").exists()
    if existing_output(prefix) and not settings.overwrite and not unfinished:
        if settings.skip_complete:
            return check_corpus(prefix)
        return _finished_before(settings)
    tokenizer = load_tokenizer(settings.tokenizer)
    files = find_files(settings.inputs, settings.file_format, settings.include)
    units = plan_units(files)
    if settings.shard:
        units = shard_of(units, *settings.shard)
    identity = identity_of(settings, tokenizer, files)
    with CorpusWriter(prefix, tokenizer.token_dtype, identity, restart=settings.restart) as writer:
        if writer.published is None:
            return _PreprocessingRun(settings, tokenizer, files, units, identity, writer).make()
        return writer.published


def _finished_before(settings: PreprocessingSettings) -> CorpusManifest:
    """The corpus under the prefix, which an earlier run of this very command made. ValueError when it is another one."""
    advice = "Give --overwrite to replace it, or another --output-prefix."
    before, now = None, {}
    if manifest_path(settings.prefix).exists() and STDIN not in settings.inputs:
        # What was read from standard input cannot be compared with what comes from it now.
        created_by = CorpusManifest.read(settings.prefix).created_by
        if created_by.get("program") == PROGRAM:
            files = find_files(settings.inputs, settings.file_format, settings.include)
            before = created_by.get("options")
            identity = identity_of(settings, load_tokenizer(settings.tokenizer), files)
            now = finished_identity(settings, identity)
    refuse_other_origin(f"{settings.prefix}.bin", before, now, advice)
    try:
        manifest = check_corpus(settings.prefix)
    except ValueError as error:
        raise InputDataError(f"{error} ({advice})") from None
    print(
        f"{settings.prefix}: done before, from the same inputs and options; "
        f"{manifest.documents:,} documents, {manifest.tokens:,} tokens"
    )
    return manifest


def identity_of(
    settings: PreprocessingSettings, tokenizer: Tokenizer, files: list[SourceFile]
) -> dict[str, Any]:
    """Everything that decides the bytes of the corpus; a run continues only one with the same identity."""
    encode = asdict(settings.encode)
    filters = encode.pop("filters")
    encode["keys"] = list(encode["keys"])
    if filters["keep_if"]:
        file_name = filters["keep_if"].rpartition(":")[0]
        filters["keep_if_sha256"] = hashlib.sha256(Path(file_name).read_bytes()).hexdigest()
    return {
        "inputs": list(settings.inputs),
        "files": plan_fingerprint(files),
        "format": settings.file_format,
        "tokenizer": tokenizer.fingerprint,
        "eod_id": tokenizer.eod_id,
        "bos_id": tokenizer.bos_id,
        "shard": list(settings.shard) if settings.shard else None,
        **encode,
        **filters,
    }


def finished_identity(settings: PreprocessingSettings, identity: dict[str, Any]) -> dict[str, Any]:
    """What a finished corpus was made from: also the limit it kept, which an unfinished run may be continued with another of."""
    return {**identity, "max_bad_fraction": settings.max_bad_fraction}


class _PreprocessingRun:
    def __init__(
        self,
        settings: PreprocessingSettings,
        tokenizer: Tokenizer,
        files: list[SourceFile],
        units: list[Unit],
        identity: dict[str, Any],
        writer: CorpusWriter,
    ) -> None:
        self._settings, self._tokenizer, self._files, self._units = (
            settings,
            tokenizer,
            files,
            units,
        )
        self._identity, self._writer = identity, writer
        self._state = (
            RunState.from_json(writer.state)
            if writer.state
            else RunState([SourceCounts() for _ in settings.inputs])
        )
        self._input_bytes = sum(unit.size_bytes for unit in units)
        self._seen: set[bytes] = set()
        if settings.encode.filters.drop_duplicates:
            saved = writer.saved_hashes()
            self._seen.update(saved[i : i + HASH_BYTES] for i in range(0, len(saved), HASH_BYTES))

    def make(self) -> CorpusManifest:
        settings, state = self._settings, self._state
        waiting: dict[int, Block] = {}
        done_bytes = sum(unit.size_bytes for unit in self._units[: state.units_done])
        with RunProgress(
            self._input_bytes, done_bytes, self._writer.documents, self._writer.tokens
        ) as progress:
            results = ordered_map(
                BlockEncoder,
                (self._tokenizer, settings.encode, settings.encoder, str(self._writer.folder)),
                self._blocks(waiting),
                settings.workers,
            )
            saved_at = time.monotonic()
            for result in results:
                block = waiting.pop(result.number)
                self._consume(block, result)
                progress.advance(block.source_bytes, self._writer.documents, self._writer.tokens)
                self._stop_if_hopeless()
                if time.monotonic() - saved_at >= settings.save_every_seconds:
                    self._writer.save(state.to_json())
                    saved_at = time.monotonic()
        self._writer.save(state.to_json())
        self._check_quality()
        manifest = self._writer.finish(self._manifest, {".statistics.json": self._write_statistics})
        print_summary(settings.prefix, manifest, self._statistics, progress.seconds)
        return manifest

    def _blocks(self, waiting: dict[int, Block]) -> Iterator[Block]:
        for block in blocks_of_units(
            self._units,
            self._state.units_done,
            self._state.unit_blocks_done,
            spool_folder=str(self._writer.folder),
        ):
            waiting[block.number] = dataclasses.replace(block, data=None)
            yield block

    def _consume(self, block: Block, result: BlockResult) -> None:
        duplicates = self._drop_duplicates(result) if result.hashes else 0
        for part in result.parts:
            if part.spill:
                self._writer.append_file(part.spill)
                os.unlink(part.spill)
            else:
                self._writer.append(part.tokens)
        self._writer.add_documents(result.lengths_tokens, result.hashes)
        if block.spool:
            os.unlink(block.spool)
        for reject in self._state.consume(block, result, duplicates):
            self._writer.add_reject(reject)
        self._state.finish_block(block, block.last_of_unit)

    def _drop_duplicates(self, result: BlockResult) -> int:
        """Take documents seen before out of `result`; returns how many."""
        itemsize = self._tokenizer.token_dtype.itemsize
        ends = (np.cumsum(result.lengths_tokens, dtype=np.int64) * itemsize).tolist()
        starts = [0, *ends[:-1]]
        digests = [
            result.hashes[at : at + HASH_BYTES] for at in range(0, len(result.hashes), HASH_BYTES)
        ]
        kept: list[int] = []
        parts: list[Part] = []
        first = 0
        for part in result.parts:
            fresh = []
            for number in range(first, first + part.documents):
                if digests[number] not in self._seen:
                    self._seen.add(digests[number])
                    fresh.append(number)
            if part.spill and not fresh:
                os.unlink(part.spill)
            elif fresh:
                base = starts[first]
                tokens = b"".join(
                    part.tokens[starts[number] - base : ends[number] - base] for number in fresh
                )
                parts.append(Part(len(fresh), tokens, part.spill))
            kept += fresh
            first += part.documents
        result.parts = parts
        result.lengths_tokens, result.text_bytes = (
            result.lengths_tokens[kept],
            result.text_bytes[kept],
        )
        result.hashes = b"".join(digests[number] for number in kept)
        return len(digests) - len(kept)

    def _stop_if_hopeless(self) -> None:
        if not self._writer.documents and self._state.bad_records() >= _HOPELESS_RECORDS:
            raise InputDataError(
                f"none of the first {self._state.bad_records()} records is usable: {self._rejected_words()}. "
                "Check --text-key and --format."
            )

    def _check_quality(self) -> None:
        state, limit = self._state, self._settings.max_bad_fraction
        fraction = state.bad_fraction(self._input_bytes)
        if fraction > limit:
            raise InputDataError(
                f"{state.bad_records()} of {state.total('records')} records are bad ({fraction:.2%} of records or bytes; the limit "
                f"is {limit:.2%}): {self._rejected_words()}. They are listed in {self._writer.folder}/rejects.jsonl. Mend the "
                "input, or run the same command with a higher --max-bad-fraction: it continues from here."
            )
        if not self._writer.documents and self._settings.shard is None:
            raise InputDataError(
                f"no document is left: {self._rejected_words() or 'the input has no records'}"
            )

    def _rejected_words(self) -> str:
        counts = self._state.rejected() + self._state.filtered()
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())

    @property
    def _sources(self) -> list[dict[str, Any]]:
        entries = []
        for number, (name, counts) in enumerate(
            zip(self._settings.inputs, self._state.sources, strict=True)
        ):
            files = {
                file.path: file.size_bytes
                for unit in self._units
                if unit.source == number
                for file in unit.files
            }
            entries.append(
                {
                    "input": name,
                    "files": len(files),
                    "bytes": sum(files.values()),
                    "records": counts.records,
                    "documents": counts.documents,
                    "tokens": counts.tokens,
                    "text_bytes": counts.text_bytes,
                    "content_sha256": counts.fingerprint,
                }
            )
        return entries

    def _manifest(self, **sizes: Any) -> CorpusManifest:
        settings, tokenizer, state = self._settings, self._tokenizer, self._state
        library = "sentencepiece" if tokenizer.kind == "sentencepiece" else "tokenizers"
        return CorpusManifest(
            format_version=FORMAT_VERSION,
            **sizes,
            tokenizer=tokenizer.entry,
            append_eod=settings.encode.append_eod,
            prepend_bos=settings.encode.prepend_bos,
            sources=self._sources,
            created_by={
                "program": PROGRAM,
                "version": __version__,
                library: version(library),
                "options": finished_identity(settings, self._identity),
            },
            rejected={"records": sum(state.rejected().values()), "reasons": dict(state.rejected())},
            filters=dict(state.filtered()),
            shard=(
                {
                    "index": settings.shard[0],
                    "count": settings.shard[1],
                    "plan": self._identity["files"],
                }
                if settings.shard
                else None
            ),
        )

    def _write_statistics(self, path: Path) -> None:
        self._statistics = statistics_of(
            self._writer.lengths_tokens(), self._settings.inputs, self._state
        )
        write_statistics(path, self._statistics)
