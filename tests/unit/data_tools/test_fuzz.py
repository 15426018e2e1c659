"""Random damage: no crash, no hang, and nothing damaged accepted in silence.

`SLM_FUZZ_CASES=100000` runs as many cases in total; the default keeps the suite short.
"""

from __future__ import annotations

import contextlib
import gzip
import io
import json
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import zstandard

from data_tools.encoding.encoders import PlainEncoder
from data_tools.encoding.filters import FilterSettings
from data_tools.encoding.worker import BlockEncoder, EncodeSettings
from data_tools.preprocess import main as preprocess
from data_tools.reading.blocks import Block
from data_tools.reading.decompression import decompressed
from data_tools.reading.documents import BLANK_LINE
from data_tools.reading.inputs import SourceFile, Unit
from megatron_slm.data.indexed import open_tokens, read_index
from megatron_slm.data.manifest import check_corpus
from megatron_slm.tokenization import load_tokenizer

CASES = int(os.environ.get("SLM_FUZZ_CASES", "2400"))
SEEDS = [
    json.dumps({"text": text, "id": n}, ensure_ascii=n % 2 == 0).encode()
    for n, text in enumerate(
        [
            "plain words",
            "naïve 日本 🙂",
            'tabs\tand "quotes" \\ back',
            "a" * 50,
            "\u2581 sign",
            "</s>",
            "1 2 3",
        ]
    )
]
PIECES = [
    b"\x00",
    b"\xff",
    b"\xc3",
    b'"',
    b"\\",
    b"\\u",
    b"\\ud800",
    b"\\u0000",
    b"{",
    b"}",
    b"\n",
    b"\r",
    b" ",
    b",",
    b":",
    b"NaN",
    b"1e999",
    b"[" * 50,
    b"null",
    b'"text"',
    b"\xef\xbb\xbf",
    b"\xed\xa0\x80",
    b"9" * 30,
]


def mutate(generator: random.Random, content: bytes, pieces=PIECES) -> bytes:
    """A few random edits: bytes changed, cut, doubled, or a nasty piece put in."""
    content = bytearray(content)
    for _ in range(generator.randrange(1, 4)):
        at = generator.randrange(len(content) + 1)
        kind = generator.randrange(5)
        if kind == 0 and content:
            content[at % len(content)] = generator.randrange(256)
        elif kind == 1:
            del content[at : at + generator.randrange(1, 20)]
        elif kind == 2:
            content[at:at] = generator.choice(pieces)
        elif kind == 3:
            content[at:at] = content[at : at + generator.randrange(1, 20)]
        else:
            content[at:at] = generator.randbytes(generator.randrange(1, 9))
    return bytes(content)


def texts_by_hand(data: bytes) -> list[str | None]:
    """The text of each line that is not blank, or None where it is bad.

    Written independently of the reader.
    """
    found = []
    for line in data.removeprefix(b"\xef\xbb\xbf").split(b"\n"):
        if not line.strip():
            continue
        try:
            text = json.loads(line.decode())["text"]
            text.encode()
            found.append(
                text if isinstance(text, str) and text.strip() and "\0" not in text else None
            )
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
            found.append(None)
    return found


def test_jsonl(vocabulary, tmp_path):
    tokenizer = load_tokenizer(vocabulary)
    settings = EncodeSettings(("text",), "\n\n", True, False, FilterSettings())
    encoder = BlockEncoder(tokenizer, settings, "auto", str(tmp_path))
    plain = PlainEncoder(tokenizer)
    eod = np.array([tokenizer.eod_id], "<u2").tobytes()
    unit = Unit("stream", (SourceFile(0, "f.jsonl", "lines", "", 1, 0),), 0, 0, 1)
    generator = random.Random(1)
    for case in range(CASES // 2):
        data = b"\n".join(generator.choices(SEEDS, k=generator.randrange(1, 6)))
        data = (
            generator.randbytes(generator.randrange(80))
            if case % 10 == 0
            else mutate(generator, data)
        )
        result = encoder(Block(unit, case, data=data))
        expected = texts_by_hand(data)
        good = [text for text in expected if text is not None]
        contents = plain.encode_batch(good) if good else []
        expected_bytes = b"".join(content + eod for content in contents)
        assert b"".join(part.tokens for part in result.parts) == expected_bytes, data
        assert len(result.lengths_tokens) == len(good), data
        bad = sum(result.rejects.values()) - result.rejects[BLANK_LINE]
        assert bad == len(expected) - len(good), data
        assert bad == sum(s.reason != BLANK_LINE for s in result.reject_samples), data


@pytest.fixture(scope="module")
def corpus(tmp_path_factory, vocabulary):
    folder = tmp_path_factory.mktemp("fuzz")
    (folder / "c.jsonl").write_bytes(b"\n".join(SEEDS))
    assert (
        preprocess(
            [
                "--input",
                str(folder / "c.jsonl"),
                "--tokenizer",
                str(vocabulary),
                "--output-prefix",
                str(folder / "c"),
                "--workers",
                "1",
            ]
        )
        == 0
    )
    return folder / "c"


@pytest.mark.parametrize("suffix", [".idx", ".bin", ".manifest.json"])
def test_damaged_corpus(corpus, tmp_path, suffix):
    """Every changed .idx or .bin is refused with a sentence.

    A changed manifest is refused, or says the same.
    """
    for other in (".idx", ".bin", ".manifest.json"):
        shutil.copy(f"{corpus}{other}", tmp_path / f"c{other}")
    path = tmp_path / f"c{suffix}"
    good = Path(f"{corpus}{suffix}").read_bytes()
    truth = check_corpus(tmp_path / "c")
    generator = random.Random(2)
    for case in range(CASES // 8):
        content = (
            generator.randbytes(generator.randrange(200))
            if case % 10 == 0
            else mutate(generator, good)
        )
        path.write_bytes(content)
        if suffix == ".idx":
            with contextlib.suppress(ValueError):
                open_tokens(tmp_path / "c", read_index(path))
        try:
            manifest = check_corpus(tmp_path / "c")
        except ValueError as error:
            assert len(str(error)) > 20
            continue
        assert content == good or suffix == ".manifest.json", content
        assert (manifest.fingerprint, manifest.documents, manifest.tokens) == (
            truth.fingerprint,
            truth.documents,
            truth.tokens,
        )


def test_damaged_compression():
    """Damaged gz and zst end with an error or give exactly the content; never anything else."""
    plain = b"\n".join(SEEDS) * 20
    generator = random.Random(3)
    for case in range(CASES // 8):
        name, pack = (
            ("gz", gzip.compress),
            ("zst", zstandard.ZstdCompressor(write_checksum=True).compress),
        )[case % 2]
        content = mutate(
            generator, pack(plain), [b"\x1f\x8b\x08", b"\x28\xb5\x2f\xfd", b"\0", b"\xff"]
        )
        got = []
        try:
            for piece in decompressed(name, io.BytesIO(content)):
                got.append(piece)
        except (ValueError, EOFError):
            continue
        # gzip's header (time, name, flags) is not covered by its checksum, and nothing is left of
        # an emptied file
        assert b"".join(got) in (plain, plain * 2, b""), content[:40]
