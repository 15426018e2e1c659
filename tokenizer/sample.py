"""The text that a vocabulary is trained on: lines of a random sample of documents."""

from __future__ import annotations

import argparse
import hashlib
from collections import Counter
from collections.abc import Iterator
from typing import Any

from data_tools.reading.inputs import find_files, plan_fingerprint
from data_tools.reading.read import read_documents, total_input_bytes

SENTENCE_BYTES = 4000
"""SentencePiece drops sentences longer than its limit; lines are cut below it instead."""


def made_from(arguments: argparse.Namespace) -> dict[str, Any]:
    """Everything that decides the vocabulary: options; paths, sizes and times of the inputs."""
    options = {
        name: value
        for name, value in vars(arguments).items()
        if name not in ("overwrite", "output_prefix")
    }
    files = find_files(arguments.input, include=arguments.include)
    return {**options, "files": plan_fingerprint(files)}


class Sample:
    """Lines of a random sample of documents, and what went into it.

    Whether a document is taken depends on the seed and its number alone, so the sample is the same
    on every machine.
    """

    def __init__(self, arguments: argparse.Namespace) -> None:
        self._arguments = arguments
        self.made_from = made_from(arguments)
        total_bytes = total_input_bytes(arguments.input, include=arguments.include)
        self._fraction = 1.0
        if arguments.sample_bytes and total_bytes:
            self._fraction = min(1.0, arguments.sample_bytes / total_bytes)
        self.documents = 0
        self.documents_seen = 0
        self.bytes = 0
        self.rejects: Counter = Counter()
        self.sha256 = hashlib.sha256()

    def __iter__(self) -> Iterator[str]:
        arguments = self._arguments
        threshold = int(self._fraction * 2**64)
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
    """The lines of a text, cut where they are longer than the trainer accepts.

    Lines, so that no piece of the vocabulary holds a newline.
    """
    for line in text.split("\n"):
        while len(line) > SENTENCE_BYTES // 4:  # a character has at most 4 bytes
            cut = line.rfind(" ", 1, SENTENCE_BYTES // 4)
            cut = cut if cut > 0 else SENTENCE_BYTES // 4
            yield line[:cut]
            line = line[cut:]
        if line:
            yield line
