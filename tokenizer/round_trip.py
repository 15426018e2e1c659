"""Does text come back from its tokens?

This is checked for every new vocabulary, with the texts that usually break one.
"""

from __future__ import annotations

from collections.abc import Iterable

from megatron_slm.tokenization import Tokenizer

AWKWARD_TEXTS = (
    "plain words",
    " leading space",
    "trailing space ",
    "two  three   spaces and a\ttab",
    "line\nbreaks\n\n\nand\r\nwindows",
    "    indented\n\tcode = {'a': 1}  # comment\n",
    "0123456789 3.14159 1,000,000 0xFF",
    "naïve café — “quotes” … ½ ﬁ",
    "日本語のテキスト 中文 한국어 العربية हिन्दी",
    "emoji 👩‍👩‍👧‍👦 🏳️‍🌈 🤦🏽‍♂️",
    "combining e\u0301 a\u0308 and \u200d joiner \ufeff mark",
    "\u00a0non-breaking\u2003spaces\u3000",
    "control <s> </s> <unk> <pad> <0x0A> ▁ literals",
    "rare \U0001f9ff \U00010348 \U000e0041",
    "a" * 300,
)


def round_trip_failures(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    """The texts that do not come back exactly.

    ▁ (U+2581), SentencePiece's own sign for a space, may come back as a space: no SentencePiece
    model can tell the two apart.
    """
    failures = []
    for text in texts:
        back = tokenizer.decode(tokenizer.encode(text))
        if back != text and not (
            tokenizer.kind == "sentencepiece" and back == text.replace("\u2581", " ")
        ):
            failures.append(text)
    return failures
