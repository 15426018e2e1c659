"""One preprocessing run: plan, encode in workers, write in order, publish."""

from __future__ import annotations

import dataclasses
import os
import time
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_tools.encoding.block_result import BlockResult
from data_tools.encoding.pool import ordered_map
from data_tools.encoding.worker import BlockEncoder
from data_tools.reading.blocks import Block
from data_tools.reading.documents import InputDataError
from data_tools.reading.inputs import STDIN, Unit, find_files, plan_units, shard_of
from data_tools.reading.streams import blocks_of_units
from data_tools.writing.duplicates import DuplicateFilter
from data_tools.writing.run_identity import PreprocessingSettings, finished_identity, identity_of
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
"""A run without a single document stops after so many bad records."""


def preprocess(settings: PreprocessingSettings) -> CorpusManifest:
    """Make the corpus and return its manifest.

    Raises ValueError (wrong usage), InputDataError or VocabularyFileError (bad input), OSError or
    WorkerDied (the machine).
    """
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
        if writer.published is not None:
            return writer.published
        return PreprocessingRun(settings, tokenizer, units, identity, writer).make()


def _finished_before(settings: PreprocessingSettings) -> CorpusManifest:
    """The corpus under the prefix, which an earlier run with the same inputs and options has made.

    Raises ValueError when it is another corpus, InputDataError when it is damaged.
    """
    advice = "Give --overwrite to replace it, or another --output-prefix."
    before = None
    now: dict[str, Any] = {}
    if manifest_path(settings.prefix).exists() and STDIN not in settings.inputs:
        # An earlier standard input cannot be compared with the present one.
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


class PreprocessingRun:
    """The parent's side of a run: gives blocks to the workers, writes their results in order."""

    def __init__(
        self,
        settings: PreprocessingSettings,
        tokenizer: Tokenizer,
        units: list[Unit],
        identity: dict[str, Any],
        writer: CorpusWriter,
    ) -> None:
        self._settings = settings
        self._tokenizer = tokenizer
        self._units = units
        self._identity = identity
        self._writer = writer
        if writer.state:
            self._state = RunState.from_json(writer.state)
        else:
            self._state = RunState([SourceCounts() for _ in settings.inputs])
        self._input_bytes = sum(unit.size_bytes for unit in units)
        self._statistics: dict[str, Any] = {}
        self._duplicates: DuplicateFilter | None = None
        if settings.encode.filters.drop_duplicates:
            token_bytes = tokenizer.token_dtype.itemsize
            self._duplicates = DuplicateFilter(writer.saved_hashes(), token_bytes)

    def make(self) -> CorpusManifest:
        """Do all blocks that are left, then publish the corpus."""
        settings = self._settings
        state = self._state
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
        """The blocks that are left to do. `waiting` keeps each one, without its data, by number."""
        for block in blocks_of_units(
            self._units,
            self._state.units_done,
            self._state.unit_blocks_done,
            spool_folder=str(self._writer.folder),
        ):
            waiting[block.number] = dataclasses.replace(block, data=None)
            yield block

    def _consume(self, block: Block, result: BlockResult) -> None:
        """Write what a worker made of a block, and count it."""
        duplicates = self._duplicates.drop_from(result) if self._duplicates is not None else 0
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

    def _stop_if_hopeless(self) -> None:
        if not self._writer.documents and self._state.bad_records() >= _HOPELESS_RECORDS:
            raise InputDataError(
                f"none of the first {self._state.bad_records()} records is usable: "
                f"{self._reasons()}. Check --text-key and --format."
            )

    def _check_quality(self) -> None:
        """Raises InputDataError when too much of the input is bad, or nothing of it is left."""
        state = self._state
        limit = self._settings.max_bad_fraction
        fraction = state.bad_fraction(self._input_bytes)
        if fraction > limit:
            raise InputDataError(
                f"{state.bad_records()} of {state.total('records')} records are bad "
                f"({fraction:.2%} of records or bytes; the limit is {limit:.2%}): "
                f"{self._reasons()}. They are listed in {self._writer.folder}/rejects.jsonl. "
                "Mend the input, or run the same command with a higher --max-bad-fraction: it "
                "continues from here."
            )
        if not self._writer.documents and self._settings.shard is None:
            raise InputDataError(
                f"no document is left: {self._reasons() or 'the input has no records'}"
            )

    def _reasons(self) -> str:
        """Why records were left out, the most frequent reason first."""
        counts = self._state.rejected() + self._state.filtered()
        return ", ".join(f"{count} {reason}" for reason, count in counts.most_common())

    def _sources(self) -> list[dict[str, Any]]:
        """An entry of the manifest for each --input argument."""
        entries = []
        files_of_source: list[dict[str, int]] = [{} for _ in self._settings.inputs]
        for unit in self._units:
            for file in unit.files:
                files_of_source[unit.source][file.path] = file.size_bytes
        for name, counts, files in zip(
            self._settings.inputs, self._state.sources, files_of_source, strict=True
        ):
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
        """sizes: what CorpusWriter.finish knows, the documents, tokens, bytes and checksums."""
        settings = self._settings
        tokenizer = self._tokenizer
        rejected = self._state.rejected()
        library = "sentencepiece" if tokenizer.kind == "sentencepiece" else "tokenizers"
        shard = None
        if settings.shard:
            index, count = settings.shard
            shard = {"index": index, "count": count, "plan": self._identity["files"]}
        return CorpusManifest(
            format_version=FORMAT_VERSION,
            **sizes,
            tokenizer=tokenizer.entry,
            append_eod=settings.encode.append_eod,
            prepend_bos=settings.encode.prepend_bos,
            sources=self._sources(),
            created_by={
                "program": PROGRAM,
                "version": __version__,
                library: version(library),
                "options": finished_identity(settings, self._identity),
            },
            rejected={"records": sum(rejected.values()), "reasons": dict(rejected)},
            filters=dict(self._state.filtered()),
            shard=shard,
        )

    def _write_statistics(self, path: Path) -> None:
        self._statistics = statistics_of(
            self._writer.lengths_tokens(), self._settings.inputs, self._state
        )
        write_statistics(path, self._statistics)
