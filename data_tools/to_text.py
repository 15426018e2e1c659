"""Turn records with several fields, or conversations, into documents for data_tools.preprocess.

    python -m data_tools.to_text --input MetaMathQA-395K.json --output text/metamath.jsonl \\
        --template '{query}\\n{response}'
    python -m data_tools.to_text --input 'tulu-3-sft-mixture/data/*.parquet' \\
        --output text/tulu3.jsonl --messages messages

Reads jsonl (also .gz, .zst), parquet, and JSON files that hold one array. Writes one {"text": ...}
per record, in their order. Text that stands under one key needs no such step: preprocess takes it
as it is (--text-key).
"""

from __future__ import annotations

import argparse
import json
import os
import string
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

from data_tools.reading.documents import BadRecord, InputDataError, check_text
from data_tools.reading.fields import records_of
from data_tools.reading.inputs import STDIN, find_files
from megatron_slm.config.arguments import Program, number_in
from megatron_slm.config.ranges import Fraction
from megatron_slm.files.atomic import sync_path
from megatron_slm.installation import says_missing_extra

PROGRAM = "to_text"
TURN = "{role}: {content}"
Render = Callable[[dict[str, Any]], str]


class UsageError(ValueError):
    """Options that do not go together."""


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.to_text",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input", nargs="+", required=True, metavar="F", help="files, folders, or globs in quotes"
    )
    parser.add_argument("--output", required=True, metavar="F.jsonl", help="file to write")
    parser.add_argument(
        "--template",
        metavar="T",
        help="the text of a record, with its fields in braces; \\n is a line break",
    )
    parser.add_argument(
        "--messages", metavar="KEY", help="the text is this list of {role, content}, turn by turn"
    )
    parser.add_argument(
        "--turn",
        default=TURN,
        metavar="T",
        help="the text of a turn; turns are joined by a blank line (default: %(default)s)",
    )
    parser.add_argument(
        "--max-bad-fraction",
        type=number_in(Fraction),
        default=0.05,
        metavar="X",
        help="share of records that may be unusable (default: %(default)s)",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace the output file")
    return parser


def renderer(options: argparse.Namespace) -> Render:
    """How a record becomes text. UsageError where the options do not say, or say it twice."""
    if bool(options.template) == bool(options.messages):
        raise UsageError("give one of --template and --messages")
    if options.template and options.turn != TURN:
        raise UsageError("--turn goes with --messages only, leave it out")
    template = _template(options.template or options.turn)
    if options.template:
        return lambda record: filled(template, record)
    return lambda record: "\n\n".join(
        filled(template, turn) for turn in turns(record, options.messages)
    )


def _template(text: str) -> list[tuple[str, str | None]]:
    """(plain text, name of the field after it) of a template."""
    try:
        parts = list(string.Formatter().parse(text.replace("\\n", "\n").replace("\\t", "\t")))
    except ValueError as error:
        raise UsageError(f"template {text!r}: {error}") from None
    for _, name, spec, conversion in parts:
        if spec or conversion or (name is not None and not name.isidentifier()):
            raise UsageError(f"template {text!r}: expected plain fields in braces, like {{query}}")
    if not any(name for _, name, _, _ in parts):
        raise UsageError(f"template {text!r}: names no field; every document would be the same")
    return [(plain, name) for plain, name, _, _ in parts]


def filled(template: Sequence[tuple[str, str | None]], record: dict[str, Any]) -> str:
    """The template with a record's fields. Raises BadRecord where one is missing or no text."""
    text = ""
    for plain, name in template:
        text += plain
        if name is not None:
            if not isinstance(record.get(name), str):
                found = type(record[name]).__name__ if name in record else "missing"
                raise BadRecord("field that is no text", f"{name} is {found}")
            text += record[name]
    return text


def turns(record: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of turns in a record. Raises BadRecord where there is none."""
    found = record.get(key)
    if not isinstance(found, list) or not found or not all(isinstance(t, dict) for t in found):
        raise BadRecord("no list of turns", f"under {key!r}")
    return found


def documents(inputs: Sequence[str], render: Render, counts: Counter) -> Iterator[str]:
    """The texts of all records; counts: of the records by outcome, "used" or a reason."""
    if STDIN in inputs:
        raise UsageError("--input -: standard input has no file name that tells its format")
    for file in find_files(inputs):
        for record in records_of(file):
            try:
                if isinstance(record, str):
                    raise BadRecord(record, "")
                text = render(record)
                check_text(text)
            except BadRecord as bad:
                counts[bad.reason] += 1
                continue
            counts["used"] += 1
            yield text


def write(options: argparse.Namespace) -> Counter:
    """Write the output under a temporary name, and give it its own when enough was usable."""
    output = Path(options.output)
    if output.exists() and not options.overwrite:
        raise UsageError(f"--output {output} exists; give --overwrite, or another name")
    render = renderer(options)
    output.parent.mkdir(parents=True, exist_ok=True)
    temporary = output.with_name(f".{output.name}.{os.getpid()}.tmp")
    counts: Counter = Counter()
    try:
        with open(temporary, "w", encoding="utf-8") as stream:
            for text in documents(options.input, render, counts):
                stream.write(json.dumps({"text": text}, ensure_ascii=False) + "\n")
            stream.flush()
            os.fsync(stream.fileno())
        bad = counts.total() - counts["used"]
        if not counts["used"] or bad > options.max_bad_fraction * counts.total():
            raise InputDataError(
                f"{bad} of {counts.total()} records are unusable ({described(counts)}), more than "
                f"--max-bad-fraction {options.max_bad_fraction} allows; nothing was written"
            )
        os.replace(temporary, output)
    finally:
        temporary.unlink(missing_ok=True)
    sync_path(output.parent)
    return counts


def described(counts: Counter) -> str:
    """The reasons and their numbers, the most frequent first."""
    reasons = [(reason, count) for reason, count in counts.most_common() if reason != "used"]
    return ", ".join(f"{reason}: {count:,}" for reason, count in reasons) or "no record"


@says_missing_extra(PROGRAM)
def main(argv: list[str] | None = None) -> int:
    options = build_parser().parse_args(argv)
    try:
        counts = write(options)
    except UsageError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 2
    except InputDataError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 3
    except OSError as error:
        print(f"{PROGRAM}: {error}", file=sys.stderr)
        return 4
    left_out = counts.total() - counts["used"]
    print(
        f"{options.output}: {counts['used']:,} documents"
        + (f", {left_out:,} records left out ({described(counts)})" if left_out else "")
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
