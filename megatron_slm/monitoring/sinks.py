"""Where metrics and messages go: metrics.jsonl always, the console, Weights & Biases; one rank
writes them.

Logging cannot change or stop training: `MultiSink` catches what a sink raises, says so once on the
others, and goes on.
"""

import contextlib
import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from megatron_slm.files.redact import redacted

LEVELS = ("info", "warning", "error")


class Sink(Protocol):
    """One destination. `log` gets one interval's metrics; `message` a sentence for a person, level
    info, warning or error; `close` how the run ended: its state (done, stopped, failed) and exit
    code.
    """

    def log(self, record: Mapping[str, Any], step: int) -> None: ...
    def message(self, text: str, level: str = "info") -> None: ...
    def close(self, state: str = "done", exit_code: int = 0) -> None: ...


class NullSink:
    """Drops everything: the sink of every rank but the logging one."""

    def log(self, record: Mapping[str, Any], step: int) -> None:
        pass

    def message(self, text: str, level: str = "info") -> None:
        pass

    def close(self, state: str = "done", exit_code: int = 0) -> None:
        pass


class MultiSink:
    """Hands each record to several sinks. A sink that raises is reported once on the others and
    tried again next time.

    Messages go out without the secrets that errors of libraries quote: a proxy's password, a token.
    """

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = list(sinks)
        self._failing: set[int] = set()

    def add(self, sink: Sink) -> None:
        self._sinks.append(sink)

    def log(self, record: Mapping[str, Any], step: int) -> None:
        for index, sink in enumerate(self._sinks):
            try:
                sink.log(record, step)
            # Any exception: a full disk, a closed terminal, a broken network must not end a run.
            except Exception as error:
                self._report_failure(index, error)
            else:
                self._failing.discard(index)

    def message(self, text: str, level: str = "info") -> None:
        if level not in LEVELS:
            raise ValueError(f"message level is {level!r}; it can be one of {', '.join(LEVELS)}")
        self._send(text, level, skip=None)

    def close(self, state: str = "done", exit_code: int = 0) -> None:
        for index, sink in enumerate(self._sinks):
            try:
                sink.close(state, exit_code)
            except Exception as error:
                self._report_failure(index, error)

    def _report_failure(self, index: int, error: Exception) -> None:
        if index in self._failing:
            return
        self._failing.add(index)
        name = type(self._sinks[index]).__name__
        self._send(
            f"{name} failed, training goes on: {type(error).__name__}: {error}",
            "warning",
            skip=index,
        )

    def _send(self, text: str, level: str, skip: int | None) -> None:
        text = redacted(text)
        for index, sink in enumerate(self._sinks):
            if index == skip:
                continue
            # Reporting the failure of a report could loop for ever.
            with contextlib.suppress(Exception):
                sink.message(text, level)


class JsonlSink:
    """metrics.jsonl, one JSON object per line, and warnings.jsonl beside it (warnings and errors,
    as {"step", "level", "text"}).

    A run resumed from step s first drops lines with step > s (and a line torn by a kill), so that
    the file continues as an uninterrupted run's would. A run that starts anew (resume_step None)
    keeps an earlier file as metrics.jsonl.previous. Every record is on disk (fsync) when `log`
    returns. Records that could not be written are kept and written with the next. NaN and infinite
    values are written as null: JSON has no other value for "no number".
    """

    def __init__(self, path: str | Path, resume_step: int | None = None) -> None:
        self.path = Path(path)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._warnings_path = self.path.with_name("warnings.jsonl")
        self._step = resume_step or 0
        self._unwritten: list[str] = []
        if resume_step is not None:
            cut_after_step(self.path, resume_step)
        else:
            for path in (self.path, self._warnings_path):
                if path.exists():
                    os.replace(path, path.with_name(path.name + ".previous"))
        self.path.touch()

    def log(self, record: Mapping[str, Any], step: int) -> None:
        self._step = step
        self._unwritten.append(
            json.dumps(
                finite_or_null({"step": step} | dict(record) | {"step": step}), allow_nan=False
            )
            + "\n"
        )
        append_durably(self.path, "".join(self._unwritten))
        self._unwritten.clear()

    def message(self, text: str, level: str = "info") -> None:
        if level != "info":
            append_warning(self._warnings_path, self._step, level, text)

    def close(self, state: str = "done", exit_code: int = 0) -> None:
        if self._unwritten:
            append_durably(self.path, "".join(self._unwritten))
            self._unwritten.clear()


def append_warning(path: Path, step: int, level: str, text: str) -> None:
    """Add one line to a warnings.jsonl. OSError when it cannot be written."""
    append_durably(path, json.dumps({"step": step, "level": level, "text": text}) + "\n")


def cut_after_step(path: Path, step: int) -> int:
    """Remove lines of a later step, and lines that are not whole JSON objects, from a metrics file;
    how many went.

    The shorter file is written under a temporary name and renamed over the old one.
    """
    if not path.exists():
        return 0
    lines = path.read_bytes().splitlines(keepends=True)
    kept = [line for line in lines if _belongs(line, step)]
    if len(kept) == len(lines):
        return 0
    temporary = path.with_name(path.name + ".tmp")
    with open(temporary, "wb") as file:
        file.writelines(kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    return len(lines) - len(kept)


def _belongs(line: bytes, step: int) -> bool:
    if not line.endswith(b"\n"):  # torn, even where what is left happens to parse
        return False
    try:
        record = json.loads(line)
    except ValueError:
        return False
    return (
        isinstance(record, dict) and isinstance(record.get("step"), int) and record["step"] <= step
    )


def append_durably(path: Path, text: str) -> None:
    """Append whole lines and fsync.

    On failure (a full disk) the half-written part is taken away again, and the error is raised.
    """
    with open(path, "ab", buffering=0) as file:
        end = file.seek(0, os.SEEK_END)
        remaining = memoryview(text.encode())
        try:
            while remaining:
                remaining = remaining[file.write(remaining) :]
            os.fsync(file.fileno())
        except OSError:
            file.truncate(end)
            raise


def finite_or_null(value: Any) -> Any:
    """The value with NaN and infinities, also inside lists and dicts, as None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: finite_or_null(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite_or_null(item) for item in value]
    return value
