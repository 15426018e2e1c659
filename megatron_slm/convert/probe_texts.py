"""Texts on which a rewritten vocabulary is compared with the one the corpora were made with."""

import unicodedata

# What conversions get wrong: spaces in runs and at the ends, tabs and line ends, scripts without
# spaces, combining marks, characters outside the vocabulary (byte fallback), SentencePiece's own
# space mark, ligatures and full-width forms (normalisation), repeats.
AWKWARD_TEXTS = (
    "",
    " ",
    "a",
    " a",
    "a ",
    "  two  spaces  ",
    "\n",
    "\n\n  x",
    "line\r\nend\t\ttab",
    "def f(x):\n        return x\n    \n",
    "naïve café",
    "e\u0301 combining",
    "日本語のテキスト",
    "Привет, мир!",
    "مرحبا",
    "🙂👩‍👩‍👧",
    "\u2581already\u2581marked",
    "ﬁnancial \uff21\uff22\uff23 ①",
    "aaaaaaaaaaaaaaaaaaaaaaa",
    "                     ",
    "0123456789 3.14159e-10",
    "$\\frac{1}{2}\\sum_{i=0}^{n} x_i^2$",
    "https://example.org/a?b=c&d=%20",
    "\x00\x01\x7f",
    "\u00a0\u2003\u200b\ufeff",
    "<|not a control|> <unknown>",
    "x" * 300 + " " * 40 + "y",
)

_WORDS = ("a", "the", "x=1", "def", "12", "é", "日本")


def wider_probe() -> tuple[str, ...]:
    """Some thousands of texts, the same each time.

    Runs of 1 to 48 spaces, line ends and tabs between, before and after words, and every character
    of the basic plane that Unicode's NFKC changes or composes, alone and between letters.
    """
    runs = [
        left + filler * count + right
        for left in ("", *_WORDS)
        for right in ("", *_WORDS[:3])
        for filler, longest in ((" ", 48), ("\n", 6), ("\t", 6), (" \n", 6))
        for count in range(1, longest + 1)
    ]
    indented = [_indented(width) for width in range(1, 9)]
    rare = [chr(code) for code in range(0xA0, 0xFFFE) if _changes(chr(code))]
    composed = [
        f"a {letter}{mark} b"
        for letter in "aeiouynAEIOU"
        for mark in "\u0300\u0301\u0302\u0303\u0308\u030a\u0323\u0327\u0328"
    ]
    return (*runs, *indented, *(f"a {c} b{c}" for c in rare), *composed)


def _indented(width: int) -> str:
    """Lines, each indented by `width` spaces more than the one before it."""
    return "\n".join(" " * (width * level) + "if x:" for level in range(9))


def _changes(character: str) -> bool:
    if "\ud800" <= character <= "\udfff" or "\uac00" <= character <= "\ud7a3":
        return False  # surrogates are no characters; thousands of Korean syllables are alike
    return (
        unicodedata.normalize("NFKC", character) != character
        or unicodedata.normalize("NFD", character) != character
        or unicodedata.combining(character) != 0
    )
