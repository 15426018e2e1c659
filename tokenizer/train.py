"""Train a SentencePiece vocabulary on a sample of a corpus.

    python -m tokenizer.train --input corpus.jsonl src/ --output-prefix vocab/code --vocab-size 32000

writes vocab/code.model, .vocab and .manifest.json. The defaults are those of Llama-2's vocabulary: BPE, byte fallback (no text
is unknown), digits one by one, runs of spaces kept, no normalisation, so that every text comes back exactly. The same inputs,
options and seed give the same file.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
from collections import Counter
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_tools.reading.documents import InputDataError
from data_tools.reading.inputs import find_files, plan_fingerprint
from data_tools.reading.read import read_documents, total_input_bytes
from megatron_slm import __version__
from megatron_slm.config.arguments import Program
from megatron_slm.files.atomic import sync_path, write_json_atomically
from megatron_slm.files.hashing import file_sha256
from megatron_slm.files.made_from import ChangedFile, refuse_other_origin
from megatron_slm.tokenization import Tokenizer, VocabularyFileError, load_tokenizer
from tokenizer.round_trip import AWKWARD_TEXTS, round_trip_failures

_SENTENCE_BYTES = 4000
"""SentencePiece drops longer sentences than its limit; lines are cut below it instead."""


def build_parser() -> Program:
    parser = Program(
        prog="python -m tokenizer.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument(
        "--input",
        nargs="+",
        required=True,
        metavar="F",
        help="jsonl (also .gz, .zst), parquet, text files, folders of text, or globs in quotes",
    )
    parser.add_argument(
        "--output-prefix",
        required=True,
        metavar="P",
        help="writes P.model, P.vocab, P.manifest.json",
    )
    parser.add_argument(
        "--vocab-size",
        type=int,
        required=True,
        metavar="N",
        help="all ids, the 256 bytes and the special ones included",
    )
    parser.add_argument(
        "--model-type", choices=("bpe", "unigram"), default="bpe", help="default: %(default)s"
    )
    parser.add_argument(
        "--text-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="where a record keeps its text",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="of folders, only file names like *.py",
    )
    parser.add_argument(
        "--sample-bytes",
        type=int,
        default=200_000_000,
        metavar="N",
        help="train on a random sample of documents of about this size; 0 = on everything (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="of the sample (default: %(default)s)")
    parser.add_argument(
        "--threads",
        type=int,
        default=4,
        help="of the trainer; part of the result's identity, so not the machine's core count (default: %(default)s)",
    )
    parser.add_argument(
        "--normalization",
        choices=("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"),
        default="identity",
        help="identity keeps text as it is; the others change it for good (default: %(default)s)",
    )
    parser.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="spell what the vocabulary lacks in bytes; without it such text becomes <unk> and is lost",
    )
    parser.add_argument(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one token per digit",
    )
    parser.add_argument(
        "--dummy-prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="treat the first word of a text like any other word",
    )
    parser.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="X",
        help="share of all characters that get a token of their own (default: %(default)s)",
    )
    parser.add_argument(
        "--special-token",
        nargs="+",
        default=[],
        metavar="T",
        help="further control tokens such as '<|im_start|>'; like <s> they never come out of text",
    )
    parser.add_argument("--overwrite", action="store_true", help="replace P.model")
    return parser


def check(arguments: argparse.Namespace) -> None:
    """Raises ValueError with all problems at once."""
    problems = []
    fixed = 4 + len(arguments.special_token) + (256 if arguments.byte_fallback else 0)
    if arguments.vocab_size <= fixed:
        problems.append(
            f"--vocab-size {arguments.vocab_size}: {fixed} ids are special tokens and bytes; ask for more"
        )
    if arguments.sample_bytes < 0:
        problems.append(f"--sample-bytes {arguments.sample_bytes}: cannot be negative")
    if arguments.threads < 1:
        problems.append(f"--threads {arguments.threads}: at least 1")
    if not 0.9 <= arguments.character_coverage <= 1:
        problems.append(
            f"--character-coverage {arguments.character_coverage}: a share from 0.9 to 1"
        )
    if len(set(arguments.special_token)) != len(arguments.special_token):
        problems.append("--special-token: the same token twice")
    if problems_of_characters := [
        token for token in arguments.special_token if not token or " " in token or "," in token
    ]:
        problems.append(f"--special-token {problems_of_characters}: no spaces or commas")
    if problems:
        raise ValueError("\n".join(problems))


def made_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the vocabulary: options, and the paths, sizes and times of the input files."""
    options = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("overwrite", "output_prefix")
    }
    files = find_files(arguments.input, include=arguments.include)
    return {**options, "files": plan_fingerprint(files)}


def finished_before(arguments: argparse.Namespace) -> Tokenizer | None:
    """The vocabulary under the output prefix, when an earlier run of this very command made it; None when there is none.

    ValueError when there is one that was made from something else, or that has changed since.
    """
    path = Path(f"{arguments.output_prefix}.model")
    if arguments.overwrite or not path.exists():
        return None
    advice = "Give --overwrite to replace it, or another --output-prefix."
    try:
        manifest = json.loads(Path(f"{arguments.output_prefix}.manifest.json").read_text("utf-8"))
        before = manifest["options"]
    except (OSError, ValueError, KeyError, TypeError):
        before = None
    refuse_other_origin(path, before, made_from(arguments), advice)
    tokenizer = load_tokenizer(path)
    if tokenizer.fingerprint != manifest["fingerprint"]:
        raise ChangedFile(f"{path} has changed since it was made. {advice}")
    return tokenizer


class Sample:
    """Lines of a random sample of documents, and what went into it.

    Whether a document is taken depends on the seed and its number alone, so the sample is the same on every machine.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.made_from = made_from(arguments)
        total_bytes = total_input_bytes(arguments.input, include=arguments.include)
        self._share = (
            min(1.0, arguments.sample_bytes / total_bytes)
            if arguments.sample_bytes and total_bytes
            else 1.0
        )
        self.documents = self.documents_seen = self.bytes = 0
        self.rejects: Counter = Counter()
        self.sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        arguments = self._arguments
        threshold = int(self._share * 2**64)
        for document in read_documents(
            arguments.input, arguments.text_key, include=arguments.include, rejects=self.rejects
        ):
            number = self.documents_seen
            self.documents_seen += 1
            ticket = hashlib.blake2b(f"{arguments.seed}:{number}".encode(), digest_size=8).digest()
            if int.from_bytes(ticket, "little") >= threshold:
                continue
            encoded = document.text.encode("utf-8")
            self.documents += 1
            self.bytes += len(encoded)
            self.sha256.update(encoded)
            yield from sentences(document.text)


def sentences(text: str) -> Iterator[str]:
    """Lines, so that no piece holds a newline, cut where they pass what the trainer accepts."""
    for line in text.split("\n"):
        while len(line) > _SENTENCE_BYTES // 4:  # a character has at most 4 bytes
            cut = line.rfind(" ", 1, _SENTENCE_BYTES // 4)
            cut = cut if cut > 0 else _SENTENCE_BYTES // 4
            yield line[:cut]
            line = line[cut:]
        if line:
            yield line


def train(arguments: argparse.Namespace) -> tuple[bytes, Sample]:
    """The model file's bytes. Raises InputDataError when the sample is empty or too small for the vocabulary."""
    import sentencepiece

    sample, model = Sample(arguments), io.BytesIO()
    lines = iter(sample)
    first = next(lines, None)
    if first is None:
        raise InputDataError(
            f"no usable text in {arguments.input}: {dict(sample.rejects) or 'the inputs are empty'}. "
            f"Records are looked up under the key {arguments.text_key}."
        )

    def all_lines() -> Iterator[str]:
        yield first
        yield from lines

    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=all_lines(),
            model_writer=model,
            vocab_size=arguments.vocab_size,
            model_type=arguments.model_type,
            byte_fallback=arguments.byte_fallback,
            split_digits=arguments.split_digits,
            normalization_rule_name=arguments.normalization,
            add_dummy_prefix=arguments.dummy_prefix,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2 * _SENTENCE_BYTES,
            character_coverage=arguments.character_coverage,
            control_symbols=arguments.special_token,
            num_threads=arguments.threads,
            unk_id=0,
            bos_id=1,
            eos_id=2,
            pad_id=3,
            input_sentence_size=0,
            train_extremely_large_corpus=arguments.sample_bytes == 0
            or arguments.sample_bytes > 1_000_000_000,
            minloglevel=2,
        )
    except (RuntimeError, OSError) as error:
        raise InputDataError(
            f"SentencePiece could not train {arguments.vocab_size} pieces on {sample.bytes:,} bytes of text: "
            f"{_last_sentence(error)}"
        ) from None
    return model.getvalue(), sample


def _last_sentence(error: Exception) -> str:
    return str(error).rsplit("] ", 1)[-1].strip() or str(error)


def publish(arguments: argparse.Namespace, model: bytes, sample: Sample) -> Tokenizer:
    """Write the model under a temporary name, prove the round trip on it, then move it to its name; it comes last, so it is finished where it stands."""
    prefix = arguments.output_prefix
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(f"{prefix}.model.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as stream:
            stream.write(model)
            stream.flush()
            os.fsync(stream.fileno())
        tokenizer = load_tokenizer(temporary)
        failures = round_trip_failures(tokenizer, AWKWARD_TEXTS)
        lossless = arguments.byte_fallback and arguments.normalization == "identity"
        if failures and lossless:
            raise InputDataError(
                f"the vocabulary does not give these texts back: {failures}; it was not written"
            )
        _write_vocabulary(Path(f"{prefix}.vocab"), tokenizer)
        write_json_atomically(
            f"{prefix}.manifest.json", manifest_of(arguments, tokenizer, sample, failures)
        )
        os.replace(temporary, f"{prefix}.model")
        sync_path(Path(prefix).parent)
    finally:
        temporary.unlink(missing_ok=True)
    return load_tokenizer(f"{prefix}.model")


def _write_vocabulary(path: Path, tokenizer: Tokenizer) -> None:
    processor = tokenizer.backend
    with open(path, "w", encoding="utf-8", newline="\n") as stream:
        for token_id in range(tokenizer.vocabulary_size):
            stream.write(f"{processor.id_to_piece(token_id)}\t{processor.get_score(token_id):g}\n")


def manifest_of(
    arguments: argparse.Namespace, tokenizer: Tokenizer, sample: Sample, failures: list[str]
) -> dict[str, Any]:
    return {
        "format_version": 1,
        "fingerprint": tokenizer.fingerprint,
        "kind": tokenizer.kind,
        "vocabulary_size": tokenizer.vocabulary_size,
        "bos_id": tokenizer.bos_id,
        "eos_id": tokenizer.eos_id,
        "pad_id": tokenizer.pad_id,
        "unk_id": tokenizer.unk_id,
        "sample": {
            "documents": sample.documents,
            "documents_seen": sample.documents_seen,
            "bytes": sample.bytes,
            "sha256": sample.sha256.hexdigest(),
            "rejected": dict(sample.rejects),
        },
        "options": sample.made_from,
        "vocab_sha256": file_sha256(f"{arguments.output_prefix}.vocab"),
        "round_trip_failures": failures,
        "created_by": {
            "program": "tokenizer.train",
            "version": __version__,
            "sentencepiece": version("sentencepiece"),
        },
    }


def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        check(arguments)
        if finished := finished_before(arguments):
            print(
                f"{arguments.output_prefix}.model: done before, from the same inputs and options; "
                f"{finished.vocabulary_size} pieces"
            )
            return 0
        model, sample = train(arguments)
        tokenizer = publish(arguments, model, sample)
    except (InputDataError, VocabularyFileError, ChangedFile) as error:
        print(f"tokenizer.train: {error}", file=sys.stderr)
        return 3
    except (ValueError, OSError) as error:
        print(f"tokenizer.train: {error}", file=sys.stderr)
        return 2
    left_out = f", {sum(sample.rejects.values())} records left out" if sample.rejects else ""
    print(
        f"{arguments.output_prefix}.model: {tokenizer.vocabulary_size} pieces from {sample.documents:,} of "
        f"{sample.documents_seen:,} documents ({sample.bytes / 1e6:.1f} MB{left_out}); round trip "
        f"{'not exact, as asked' if round_trip_failures(tokenizer, AWKWARD_TEXTS) else 'exact'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
