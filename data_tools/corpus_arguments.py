"""Command-line arguments of the programs that read a finished corpus."""

from __future__ import annotations

import argparse


def add_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("prefix", type=corpus_prefix, metavar="C", help="the corpus, without .bin")


def add_tokenizer_of_corpus(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--tokenizer",
        metavar="P.model",
        help="its tokenizer, when it is no longer where the manifest says",
    )


def corpus_prefix(path: str) -> str:
    """The prefix of a corpus that is named by its prefix or by one of its two files."""
    return path.removesuffix(".bin").removesuffix(".idx")
