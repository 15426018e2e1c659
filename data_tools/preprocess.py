"""Text to the .bin/.idx that megatron-core trains on.

    python -m data_tools.preprocess --input corpus.jsonl --tokenizer vocab.model \\
        --output-prefix data/corpus --workers 8

reads jsonl (also .gz, .zst), parquet, text files, folders of text or standard input (-), and writes
data/corpus.bin, .idx, .manifest.json and .statistics.json. Killed or interrupted, the same command
continues; the result is the same to the byte, whatever the number of workers. One document of the
input is one document of the corpus, in the order of the input.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from pathlib import Path

from data_tools.encoding.filters import FilterSettings, load_predicate
from data_tools.encoding.pool import WorkerDied
from data_tools.encoding.worker import EncodeSettings
from data_tools.preprocessing import preprocess
from data_tools.reading.arguments import add_record_arguments
from data_tools.reading.documents import InputDataError
from data_tools.reading.inputs import STDIN
from data_tools.writing.run_identity import PreprocessingSettings
from megatron_slm.config.arguments import Program
from megatron_slm.files.made_from import ChangedFile
from megatron_slm.installation import says_missing_extra
from megatron_slm.tokenization import VocabularyFileError

_CONTINUE = "What was saved stands; run the same command again to continue."


def build_parser() -> Program:
    parser = Program(
        prog="python -m data_tools.preprocess",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog="exit codes: 0 done, 2 wrong usage, 3 bad data (nothing was published), 4 the "
        "machine failed (disk full, worker killed): run the same command again to continue.",
    )
    _add_input_and_output(parser.add_argument_group("what goes in and comes out"))
    _add_filters(parser.add_argument_group("bad input and filters"))
    _add_scale_and_restart(parser.add_argument_group("scale and restart"))
    return parser


def _add_input_and_output(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="F",
        help="files, folders (every file below), globs in quotes, or - for jsonl on standard "
        "input; the order given is the order of the documents",
    )
    group.add_argument(
        "--tokenizer",
        required=True,
        metavar="P.model",
        help="SentencePiece .model or Hugging Face tokenizer.json",
    )
    group.add_argument(
        "--output-prefix",
        required=True,
        metavar="C",
        help="writes C.bin, C.idx, C.manifest.json, ...",
    )
    group.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        metavar="W",
        help="processes (default: %(default)s)",
    )
    group.add_argument(
        "--format",
        choices=("auto", "jsonl", "parquet", "text"),
        default="auto",
        help="auto goes by the file name: .jsonl and .ndjson hold one record per line, .parquet "
        "one per row, any other file is one document",
    )
    add_record_arguments(group)
    group.add_argument(
        "--key-separator", default="\n\n", help="between several keys (default: a blank line)"
    )
    group.add_argument(
        "--append-eod",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="close every document with the end-of-document token",
    )
    group.add_argument(
        "--prepend-bos",
        action="store_true",
        help="begin every document with the begin-of-sequence token",
    )


def _add_filters(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--max-bad-fraction",
        type=float,
        default=0.05,
        metavar="X",
        help="fail (exit code 3) when more of the records, or of the bytes, is broken; what was "
        "left out is listed in C.rejects.jsonl (default: %(default)s)",
    )
    group.add_argument(
        "--min-characters", type=int, default=0, metavar="N", help="leave out shorter documents"
    )
    group.add_argument(
        "--max-characters", type=int, default=0, metavar="N", help="leave out longer documents"
    )
    group.add_argument(
        "--drop-duplicates",
        action="store_true",
        help="keep the first of documents with the same text (about 100 bytes of memory per "
        "document)",
    )
    group.add_argument(
        "--keep-if",
        default="",
        metavar="FILE.py:FUNCTION",
        help="keep documents where FUNCTION(text, record) is true",
    )


def _add_scale_and_restart(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--shard",
        type=parse_shard,
        metavar="i/n",
        help="do part i of n (from 0) into C.shard-i-of-n; data_tools.merge joins the parts",
    )
    group.add_argument(
        "--overwrite",
        action="store_true",
        help="replace a complete corpus under this prefix, at the end",
    )
    group.add_argument(
        "--skip-complete",
        action="store_true",
        help="succeed at once when the corpus is complete already, whatever it was made from "
        "(without this: when it was made from the same inputs and options, and else fail)",
    )
    group.add_argument(
        "--restart", action="store_true", help="throw away an unfinished run under this prefix"
    )
    group.add_argument(
        "--save-every-seconds",
        type=float,
        default=10.0,
        metavar="S",
        help="how much work a kill may cost (default: %(default)s)",
    )
    group.add_argument(
        "--encoder",
        choices=("auto", "plain"),
        default="auto",
        help="auto uses a word cache where it is proved to give the tokenizer's own ids",
    )


def parse_shard(text: str) -> tuple[int, int]:
    try:
        index, count = (int(part) for part in text.split("/"))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r}: expected i/n, for example 0/8") from None
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text!r}: the index runs from 0 to {count - 1}")
    return index, count


def problems_of(arguments: argparse.Namespace) -> list[str]:
    """A sentence for every option with an impossible value."""
    problems = []
    if arguments.workers < 1:
        problems.append(f"--workers {arguments.workers}: at least 1")
    if not 0 <= arguments.max_bad_fraction <= 1:
        problems.append(f"--max-bad-fraction {arguments.max_bad_fraction}: a fraction from 0 to 1")
    if arguments.min_characters < 0 or arguments.max_characters < 0:
        problems.append("--min-characters and --max-characters cannot be negative")
    if 0 < arguments.max_characters < arguments.min_characters:
        problems.append(
            f"--max-characters {arguments.max_characters} is below --min-characters "
            f"{arguments.min_characters}"
        )
    if not 0 <= arguments.save_every_seconds < math.inf:
        problems.append(f"--save-every-seconds {arguments.save_every_seconds}: at least 0")
    if arguments.shard and STDIN in arguments.input:
        problems.append(
            "--shard: standard input cannot be cut into shards; write it to a file first"
        )
    if arguments.shard and arguments.drop_duplicates:
        problems.append(
            "--drop-duplicates with --shard would see only the duplicates inside one shard; drop "
            "them in one run"
        )
    if not Path(arguments.output_prefix).name or Path(arguments.output_prefix).is_dir():
        problems.append(
            f"--output-prefix {arguments.output_prefix}: a folder; give a prefix such as "
            f"{Path(arguments.output_prefix) / 'corpus'}"
        )
    if arguments.keep_if:
        try:
            load_predicate(arguments.keep_if)
        except ValueError as error:
            problems.append(str(error))
    return problems


def settings_of(arguments: argparse.Namespace) -> PreprocessingSettings:
    """Raises ValueError with all problems of the options at once."""
    if problems := problems_of(arguments):
        raise ValueError("\n".join(problems))
    filters = FilterSettings(
        arguments.min_characters,
        arguments.max_characters,
        arguments.keep_if,
        arguments.drop_duplicates,
    )
    encode = EncodeSettings(
        tuple(arguments.text_key),
        arguments.key_separator,
        arguments.append_eod,
        arguments.prepend_bos,
        filters,
    )
    return PreprocessingSettings(
        inputs=tuple(arguments.input),
        tokenizer=arguments.tokenizer,
        output_prefix=arguments.output_prefix,
        workers=arguments.workers,
        file_format=arguments.format,
        include=tuple(arguments.include),
        encode=encode,
        max_bad_fraction=arguments.max_bad_fraction,
        shard=arguments.shard,
        overwrite=arguments.overwrite,
        skip_complete=arguments.skip_complete,
        restart=arguments.restart,
        save_every_seconds=arguments.save_every_seconds,
        encoder=arguments.encoder,
    )


@says_missing_extra("preprocess")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        preprocess(settings_of(arguments))
    except (InputDataError, VocabularyFileError, ChangedFile) as error:
        print(f"preprocess: {error}", file=sys.stderr)
        return 3
    except ValueError as error:
        print(f"preprocess: {error}", file=sys.stderr)
        return 2
    except (OSError, WorkerDied, MemoryError) as error:
        print(f"preprocess: {error or type(error).__name__}. {_CONTINUE}", file=sys.stderr)
        return 4
    except KeyboardInterrupt:
        print(f"preprocess: interrupted. {_CONTINUE}", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
