"""Train a SentencePiece vocabulary on a sample of a corpus.

    python -m tokenizer.train --input corpus.jsonl src/ --output-prefix vocab/code \\
        --vocab-size 32000

writes vocab/code.model, .vocab and .manifest.json. The defaults are those of Llama-2's vocabulary:
BPE, byte fallback (no text is unknown), digits one by one, runs of spaces kept, no normalisation.
Every text therefore comes back exactly. The same inputs, options and seed give the same file.
"""

from __future__ import annotations

import argparse
import io
import sys
from itertools import chain

from data_tools.reading.arguments import add_record_arguments
from data_tools.reading.documents import InputDataError
from megatron_slm.config.arguments import Program
from megatron_slm.files.made_from import ChangedFile
from megatron_slm.installation import says_missing_extra
from megatron_slm.tokenization import VocabularyFileError
from tokenizer.round_trip import AWKWARD_TEXTS, round_trip_failures
from tokenizer.sample import SENTENCE_BYTES, Sample
from tokenizer.vocabulary_files import finished_before, publish


def build_parser() -> Program:
    parser = Program(
        prog="python -m tokenizer.train",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # The manifest lists the options in this order.
    _add_input_and_output(parser)
    _add_sample(parser.add_argument_group("the sample"))
    _add_vocabulary(parser.add_argument_group("the vocabulary"))
    return parser


def _add_input_and_output(parser: Program) -> None:
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
    parser.add_argument("--overwrite", action="store_true", help="replace P.model")
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
    add_record_arguments(parser)


def _add_sample(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--sample-bytes",
        type=int,
        default=200_000_000,
        metavar="N",
        help="train on a random sample of documents of about this size; 0 = on everything "
        "(default: %(default)s)",
    )
    group.add_argument("--seed", type=int, default=1, help="of the sample (default: %(default)s)")
    group.add_argument(
        "--threads",
        type=int,
        default=4,
        help="of the trainer; part of the result's identity, so not the machine's core count "
        "(default: %(default)s)",
    )


def _add_vocabulary(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--normalization",
        choices=("identity", "nfkc", "nmt_nfkc", "nfkc_cf", "nmt_nfkc_cf"),
        default="identity",
        help="identity keeps text as it is; the others change it for good (default: %(default)s)",
    )
    group.add_argument(
        "--byte-fallback",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="spell what the vocabulary lacks in bytes; without it such text becomes <unk> and is "
        "lost",
    )
    group.add_argument(
        "--split-digits",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="one token per digit",
    )
    group.add_argument(
        "--dummy-prefix",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="treat the first word of a text like any other word",
    )
    group.add_argument(
        "--character-coverage",
        type=float,
        default=0.9995,
        metavar="X",
        help="share of all characters that get a token of their own (default: %(default)s)",
    )
    group.add_argument(
        "--special-token",
        nargs="+",
        default=[],
        metavar="T",
        help="further control tokens such as '<|im_start|>'; like <s> they never come out of text",
    )


def check_options(arguments: argparse.Namespace) -> None:
    """Raises ValueError with all problems at once."""
    problems = []
    fixed = 4 + len(arguments.special_token) + (256 if arguments.byte_fallback else 0)
    if arguments.vocab_size <= fixed:
        problems.append(
            f"--vocab-size {arguments.vocab_size}: {fixed} ids are special tokens and bytes; ask "
            "for more"
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
    unusable = [
        token for token in arguments.special_token if not token or " " in token or "," in token
    ]
    if unusable:
        problems.append(f"--special-token {unusable}: no spaces or commas")
    if problems:
        raise ValueError("\n".join(problems))


def train(arguments: argparse.Namespace) -> tuple[bytes, Sample]:
    """The model file's bytes, and the sample that it was trained on.

    Raises InputDataError when the sample is empty or too small for the vocabulary.
    """
    import sentencepiece

    sample = Sample(arguments)
    model = io.BytesIO()
    lines = iter(sample)
    first = next(lines, None)
    if first is None:
        raise InputDataError(
            f"no usable text in {arguments.input}: "
            f"{dict(sample.rejects) or 'the inputs are empty'}. "
            f"Records are looked up under the key {arguments.text_key}."
        )
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=chain([first], lines),
            model_writer=model,
            vocab_size=arguments.vocab_size,
            model_type=arguments.model_type,
            byte_fallback=arguments.byte_fallback,
            split_digits=arguments.split_digits,
            normalization_rule_name=arguments.normalization,
            add_dummy_prefix=arguments.dummy_prefix,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            max_sentence_length=2 * SENTENCE_BYTES,
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
            f"SentencePiece could not train {arguments.vocab_size} pieces on {sample.bytes:,} "
            f"bytes of text: {_last_sentence(error)}"
        ) from None
    return model.getvalue(), sample


def _last_sentence(error: Exception) -> str:
    """The message of SentencePiece after the source position and the failed condition."""
    return str(error).rsplit("] ", 1)[-1].strip() or str(error)


@says_missing_extra("tokenizer.train")
def main(argv: list[str] | None = None) -> int:
    arguments = build_parser().parse_args(argv)
    try:
        check_options(arguments)
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
        f"{arguments.output_prefix}.model: {tokenizer.vocabulary_size} pieces from "
        f"{sample.documents:,} of {sample.documents_seen:,} documents "
        f"({sample.bytes / 1e6:.1f} MB{left_out}); round trip "
        f"{'not exact, as asked' if round_trip_failures(tokenizer, AWKWARD_TEXTS) else 'exact'}"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
