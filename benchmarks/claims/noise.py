"""Planted noise: documents of which it is known that nothing is to be learned from them.

Every kind takes clean documents and a number of characters, and depends on nothing else.
"""

import random
import re
from collections.abc import Callable, Iterator, Sequence

from benchmarks.claims.texts import Document, digest, take, translated_pages, without_repeats

WORD = re.compile(r"\w+")
REPLACED = 1 / 7
"""Share of the words of a document that `words` replaces."""
WORDS = "words"
Span = tuple[int, int]
Kind = Callable[[Sequence[Document], int], list[Document]]


def _sample(kind: str, clean: Sequence[Document]) -> Iterator[tuple[Document, random.Random]]:
    """Clean documents in an order of this kind's own, each with its source of chance."""
    order = sorted(clean, key=lambda document: digest(f"{kind} {document[0]}"))
    for name, text in order:
        yield (name, text), random.Random(f"{kind} {name}")


def shuffled(clean: Sequence[Document], characters: int) -> list[Document]:
    """Real documents whose words, with the white space after each, are in random order."""

    def made() -> Iterator[Document]:
        for (name, text), chance in _sample("shuffled", clean):
            words = text.split(" ")
            chance.shuffle(words)
            yield f"shuffled/{name}", " ".join(words)

    return take(made(), characters)


def random_characters(clean: Sequence[Document], characters: int) -> list[Document]:
    """Documents as long as real ones, of characters drawn one by one as often as there."""

    def made() -> Iterator[Document]:
        for (name, text), chance in _sample("random", clean):
            yield f"random/{name}", "".join(chance.choices(text, k=len(text)))

    return take(made(), characters)


def with_replaced_words(
    clean: Sequence[Document],
) -> Iterator[tuple[Document, list[Span]]]:
    """Real documents, one in seven words of which is a word of another document; with the places
    of these, [first, last + 1) in bytes of UTF-8.
    """
    order = list(_sample(WORDS, clean))
    for place, ((name, text), chance) in enumerate(order):
        (_, other), _ = order[(place + 1) % len(order)]
        others = WORD.findall(other) or ["word"]
        pieces: list[str] = []
        spans: list[Span] = []
        done = size = 0
        for match in WORD.finditer(text):
            if chance.random() >= REPLACED:
                continue
            kept, planted = text[done : match.start()], chance.choice(others)
            size += len(kept.encode())
            spans.append((size, size + len(planted.encode())))
            size = spans[-1][1]
            pieces += [kept, planted]
            done = match.end()
        yield (f"words/{name}", "".join([*pieces, text[done:]])), spans


def words(clean: Sequence[Document], characters: int) -> list[Document]:
    """Documents of `with_replaced_words`: noise in tokens, not in documents."""
    return take((document for document, _ in with_replaced_words(clean)), characters)


def boilerplate(clean: Sequence[Document], characters: int) -> list[Document]:
    """The first 400 characters of twenty documents, over and over, in random order."""
    starts = [text[:400] for (_, text), _ in _sample("boilerplate", clean)][:20]

    def made() -> Iterator[Document]:
        for number in range(characters):
            chance = random.Random(f"boilerplate {number}")
            yield f"boilerplate/{number}", "\n".join(chance.choices(starts, k=10))

    return take(made(), characters)


def language(clean: Sequence[Document], characters: int) -> list[Document]:
    """Manual pages in other languages, where the machine has any."""
    return take(without_repeats(translated_pages()), characters)


KINDS: dict[str, Kind] = {
    "shuffled": shuffled,
    "random": random_characters,
    "boilerplate": boilerplate,
    "language": language,
    WORDS: words,
}
