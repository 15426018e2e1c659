"""The corpora of a pair as jsonl: what pretraining meets, what is wanted, what it is measured on.

    corpus.jsonl     other sources, and some documents of the target kind that no one else reads
    curated.jsonl    documents of the target kind, for the reference
    held_out.jsonl   documents of the target kind, in no training data
    sources.json     documents, characters and fingerprint of each, and of each source in it

Planted noise (noise.py) is a corpus of its own in a folder of its own, so that a run reports what
share of it was selected. The three parts of the target kind are disjoint, by the hash of a
document's id.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.claims import noise, texts
from benchmarks.claims.texts import Document
from megatron_slm.files.atomic import write_text_atomically

SOURCES: dict[str, texts.Source] = {
    "library_modules": texts.library_modules,
    "library_leftovers": texts.library_leftovers,
    "package_sources": texts.package_sources,
    "docstrings": texts.docstrings,
    "package_pages": texts.package_pages,
    "system_documentation": texts.system_documentation,
    "manual_pages": texts.manual_pages,
}
SPANS = "spans.json"
PARTS = {"held_out": (0,), "curated": (1, 2, 3), "corpus": (4, 5)}
"""Which sixths of the target's documents a part takes."""


def part_of(name: str) -> str:
    """The part that a document of the target kind belongs to."""
    sixth = texts.digest(f"part of {name}")[0] % 6
    return next(part for part, sixths in PARTS.items() if sixth in sixths)


def target_parts(source: texts.Source, sizes: Mapping[str, int]) -> dict[str, list[Document]]:
    """The three parts of the target kind, each of so many characters or all there are."""
    found: dict[str, list[Document]] = {part: [] for part in PARTS}
    missing = dict(sizes)
    for document in texts.without_repeats(source()):
        part = part_of(document[0])
        if missing[part] > 0:
            found[part].append(document)
            missing[part] -= len(document[1])
        if max(missing.values()) <= 0:
            break
    return found


def gather(
    pair: Mapping[str, Any], characters: Mapping[str, int]
) -> dict[str, dict[str, list[Document]]]:
    """Corpus name -> source name -> documents.

    pair: `target`, a source, and `others`, the share of the corpus's characters from each other
    source; what is left is of the target kind.
    characters: of corpus, curated and held_out.
    """
    of_target = 1 - sum(pair["others"].values())
    sizes = {**characters, "corpus": round(of_target * characters["corpus"])}
    target = target_parts(SOURCES[pair["target"]], sizes)
    corpora = {name: {pair["target"]: documents} for name, documents in target.items()}
    for name, share in pair["others"].items():
        size = round(share * characters["corpus"])
        corpora["corpus"][name] = texts.take(texts.without_repeats(SOURCES[name]()), size)
    return corpora


def write_corpora(folder: Path, pair: Mapping[str, Any], characters: Mapping[str, int]) -> None:
    """Write every corpus and sources.json. ValueError where this machine has no text for one."""
    _write_all(folder, gather(pair, characters))


def write_noise(folder: Path, kind: str, share: float, clean: Path) -> None:
    """Write noise of one kind, `share` times as many characters as the documents of `clean` have;
    for noise in tokens also spans.json, id -> the places of the planted words in bytes.

    Raises ValueError where this machine has none.
    """
    records = map(json.loads, clean.read_text(encoding="utf-8").splitlines())
    found = [
        (record.get("id", str(number)), record["text"]) for number, record in enumerate(records)
    ]
    size = round(share * sum(len(text) for _, text in found))
    planted = noise.KINDS[kind](found, size)
    _write_all(folder, {kind: {kind: planted}})
    if kind == noise.WORDS:
        made = zip(planted, noise.with_replaced_words(found), strict=False)
        spans = {name: spans for (name, _), (_, spans) in made}
        (folder / SPANS).write_text(json.dumps(spans) + "\n")


def _write_all(folder: Path, corpora: Mapping[str, Mapping[str, list[Document]]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    description = {}
    for name, sources in corpora.items():
        empty = [source for source, documents in sources.items() if not documents]
        if empty:
            raise ValueError(
                f"corpus {name}: this machine has no text for {', '.join(empty)}; see "
                "benchmarks/claims/texts.py for where it is looked for"
            )
        documents = [document for found in sources.values() for document in found]
        documents.sort(key=lambda document: texts.digest(f"order of {document[0]}"))
        description[name] = {
            **_size(documents),
            "sha256": _write_jsonl(folder / f"{name}.jsonl", documents),
            "sources": {source: _size(found) for source, found in sources.items()},
        }
    (folder / "sources.json").write_text(json.dumps(description, indent=1) + "\n")


def _size(documents: Sequence[Document]) -> dict[str, int]:
    return {"documents": len(documents), "characters": sum(len(text) for _, text in documents)}


def _write_jsonl(path: Path, documents: Sequence[Document]) -> str:
    """Write one record a line; the sha256 of the file."""
    lines = "".join(json.dumps({"text": text, "id": name}) + "\n" for name, text in documents)
    write_text_atomically(path, lines)
    return hashlib.sha256(lines.encode()).hexdigest()
