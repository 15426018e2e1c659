"""Command-line arguments of every program that reads text."""

from __future__ import annotations

import argparse


def add_record_arguments(parser: argparse.ArgumentParser | argparse._ArgumentGroup) -> None:
    """Where a record keeps its text, and which files of a folder are read."""
    parser.add_argument(
        "--text-key",
        nargs="+",
        default=["text"],
        metavar="KEY",
        help="where a record keeps its text; several keys are joined (default: text)",
    )
    parser.add_argument(
        "--include",
        nargs="+",
        default=[],
        metavar="GLOB",
        help="of folders, only file names like *.py",
    )
