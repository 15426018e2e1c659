"""From --input arguments to an ordered list of files, and from files to units of work.

The order of the files is the order of documents in the corpus: arguments as given; inside a folder
or a glob, files by path. A unit is the smallest piece that a shard can begin at. How files are cut
into units depends on their sizes alone, so it is the same on every machine.
"""

from __future__ import annotations

import fnmatch
import glob
import hashlib
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from data_tools.reading.documents import InputDataError

BLOCK_BYTES = 4 << 20
FILES_PER_BLOCK = 512
STDIN = "-"

_LINES = (".jsonl", ".ndjson")
_PARQUET = (".parquet", ".pq")
_COMPRESSED = (".gz", ".zst", ".zstd")


@dataclass(frozen=True, slots=True)
class SourceFile:
    source: int
    """Position of the --input argument that named it."""
    path: str
    file_format: str
    """lines, text or parquet."""
    compression: str
    """"" , gz or zst."""
    size_bytes: int
    mtime_ns: int


@dataclass(frozen=True, slots=True)
class Unit:
    kind: str
    """`lines`: a byte range of jsonl; `files`: whole text files; `rows`: a row group of a parquet
    file; `stream`: one compressed jsonl file, or standard input."""
    files: tuple[SourceFile, ...]
    start: int
    end: int
    """For `lines` a byte, for `rows` a row group; else 0."""
    size_bytes: int
    """What the unit counts for in shards and progress."""

    @property
    def source(self) -> int:
        return self.files[0].source


def find_files(
    inputs: Sequence[str], file_format: str = "auto", include: Sequence[str] = ()
) -> list[SourceFile]:
    """Every file that the arguments name.

    An argument is a file, a folder (all files below it but hidden ones), a glob, or - for standard
    input. Raises InputDataError when an argument names nothing.
    """
    files: list[SourceFile] = []
    for source, argument in enumerate(inputs):
        if argument == STDIN:
            files.append(
                SourceFile(
                    source, STDIN, "lines" if file_format == "auto" else file_format, "", 0, 0
                )
            )
            continue
        paths = list(_paths_of(argument, include))
        if not paths:
            raise InputDataError(
                f"--input {argument}: no such file or folder, and no file matches it"
                + (f" and --include {' '.join(include)}" if include else "")
            )
        files.extend(_describe(source, path, in_folder, file_format) for path, in_folder in paths)
    return files


def _paths_of(argument: str, include: Sequence[str]) -> Iterator[tuple[str, bool]]:
    """(path, whether it was found inside a folder) in order."""
    matches = (
        [argument]
        if os.path.lexists(argument)
        else sorted(glob.glob(argument, recursive=True), key=os.fsencode)
    )
    for path in matches:
        if not os.path.isdir(path):
            yield path, False
            continue
        found = []
        for folder, folders, names in os.walk(path):
            folders[:] = [name for name in folders if not name.startswith(".")]
            found += [os.path.join(folder, name) for name in names if _is_wanted(name, include)]
        yield from ((file, True) for file in sorted(found, key=os.fsencode))


def _is_wanted(name: str, include: Sequence[str]) -> bool:
    """Whether a file of this name, found inside a folder, is one of the inputs."""
    if name.startswith("."):
        return False
    return not include or any(fnmatch.fnmatch(name, pattern) for pattern in include)


def _describe(source: int, path: str, in_folder: bool, file_format: str) -> SourceFile:
    stem, suffix = os.path.splitext(path.lower())
    compression = {".gz": "gz", ".zst": "zst", ".zstd": "zst"}.get(suffix, "")
    suffix = os.path.splitext(stem)[1] if compression else suffix
    if file_format == "auto":
        if suffix in _LINES or (suffix == ".json" and not in_folder):
            file_format = "lines"
        else:
            file_format = "parquet" if suffix in _PARQUET and not compression else "text"
    else:
        file_format = {"jsonl": "lines"}.get(file_format, file_format)
    try:
        status = os.stat(path)
    except OSError:  # a dangling link: kept, so that whoever reads it reports it
        return SourceFile(source, path, file_format, compression, 0, 0)
    return SourceFile(source, path, file_format, compression, status.st_size, status.st_mtime_ns)


def plan_units(files: Sequence[SourceFile], block_bytes: int = BLOCK_BYTES) -> list[Unit]:
    """Cut files into units, in order.

    Text files are grouped. jsonl is cut into byte ranges; a line belongs to the range that it
    begins in. parquet is cut into row groups. A compressed jsonl file or standard input stays
    whole.
    """
    units: list[Unit] = []
    group: list[SourceFile] = []
    group_bytes = 0

    def close_group() -> None:
        if group:
            units.append(Unit("files", tuple(group), 0, 0, group_bytes))
            group.clear()

    for file in files:
        if file.file_format != "text" or (
            group
            and (
                file.source != group[0].source
                or len(group) >= FILES_PER_BLOCK
                or group_bytes + file.size_bytes > block_bytes
            )
        ):
            close_group()
        if file.path == STDIN or (file.file_format == "lines" and file.compression):
            units.append(Unit("stream", (file,), 0, 0, file.size_bytes))
        elif file.file_format == "text":
            group_bytes = group_bytes + file.size_bytes if group else file.size_bytes
            group.append(file)
        elif file.file_format == "parquet":
            units.extend(_row_groups(file))
        else:
            units.extend(_byte_ranges(file, block_bytes))
    close_group()
    return units


def _byte_ranges(file: SourceFile, block_bytes: int) -> Iterator[Unit]:
    for start in range(0, max(file.size_bytes, 1), block_bytes):
        end = min(start + block_bytes, file.size_bytes)
        yield Unit("lines", (file,), start, end, end - start)


def _row_groups(file: SourceFile) -> list[Unit]:
    import pyarrow.parquet

    try:
        metadata = pyarrow.parquet.read_metadata(file.path)
    except Exception:
        # pyarrow has several families of errors; the worker that reads the unit reports the file.
        return [Unit("rows", (file,), 0, 0, file.size_bytes)]
    return [
        Unit("rows", (file,), group, group + 1, metadata.row_group(group).total_byte_size)
        for group in range(metadata.num_row_groups)
    ]


def shard_of(units: Sequence[Unit], index: int, count: int) -> list[Unit]:
    """The part of the units that shard `index` of `count` owns: contiguous, and equal by bytes.

    The shards, in order, are the whole.
    """
    total_bytes = sum(max(unit.size_bytes, 1) for unit in units)
    mine = []
    done_bytes = 0
    for unit in units:
        if done_bytes * count // max(total_bytes, 1) == index:
            mine.append(unit)
        done_bytes += max(unit.size_bytes, 1)
    return mine


def plan_fingerprint(files: Sequence[SourceFile]) -> str:
    """Identity of the list of inputs: paths, sizes and modification times.

    The content has a fingerprint of its own, which is made while it is read.
    """
    state = hashlib.sha256()
    for file in files:
        facts = (file.source, file.path, file.file_format, file.size_bytes, file.mtime_ns)
        line = "\0".join(map(str, facts)) + "\n"
        state.update(line.encode("utf-8", "surrogateescape"))
    return "sha256:" + state.hexdigest()
