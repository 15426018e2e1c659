"""What the entries of a description refer to: each other by name, or what exists by its path."""

import os
from dataclasses import dataclass
from pathlib import Path

from megatron_slm.checkpoint.folder import read_checkpoint_info, resolve_checkpoint
from megatron_slm.config.nearest import nearest
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_manifest import ScoreManifest
from megatron_slm.pipeline.description import Pipeline
from megatron_slm.tokenization import load_tokenizer


@dataclass(frozen=True)
class Found:
    """A resolved reference."""

    path: str
    after: tuple[str, ...]
    """Stages that make it; empty for something that exists."""
    fingerprint: str = ""
    """Identity of something that exists; what a stage makes is identified by its stage."""


class Names:
    """Resolves the references of one description and collects problems in two lists.

    settings: references to nothing; data: unusable files at a path.
    """

    def __init__(self, description: Pipeline):
        self.folder = Path(description.folder)
        self.settings: list[str] = []
        self.data: list[str] = []
        self._description = description
        self._corpora = dict(_corpora(description))

    def below(self, name: str) -> str:
        return str(self.folder / name)

    def expanded(self, words: list[str]) -> list[str]:
        """Words with {folder} replaced by the pipeline's folder."""
        return [word.replace("{folder}", str(self.folder)) for word in words]

    def inputs(self, words: list[str]) -> list[str]:
        """The same for paths, seen from where submit was called: jobs start in the checkout."""
        return [os.path.abspath(word) for word in self.expanded(words)]

    def tokenizer(self) -> Found:
        given = self._description.tokenizer
        if not given.path:
            return Found(self.below("tokenizer.model"), ("tokenizer",))
        try:
            fingerprint = load_tokenizer(given.path).fingerprint
        except (ValueError, OSError) as error:
            self.data.append(f"tokenizer.path: {error}")
            fingerprint = ""
        return Found(str(Path(given.path).absolute()), (), fingerprint)

    def corpus(self, reference: object, where: str) -> Found:
        def identity(path: str) -> str:
            return CorpusManifest.read(path).fingerprint

        known = {name: self.below(name) for name in self._corpora}
        return self._find(reference, where, known, self._corpora, identity)

    def model(self, reference: str, where: str) -> Found:
        def identity(path: str) -> str:
            return read_checkpoint_info(resolve_checkpoint(path)).fingerprint

        names = [*self._description.runs, *self._description.imports]
        known = {name: self.below(name) for name in names}
        return self._find(reference, where, known, {name: (name,) for name in names}, identity)

    def run(self, reference: str, where: str) -> Found:
        """A run of this description: nothing else has a configuration and metrics."""
        runs = self._description.runs
        if reference not in runs:
            self._unknown(reference, where, runs)
        return Found(self.below(reference), (reference,))

    def score_store(self, reference: str, where: str) -> Found:
        def identity(path: str) -> str:
            manifest = ScoreManifest.from_json(Path(path) / "manifest.json")
            return f"{manifest.reference_fingerprint} {manifest.corpus_fingerprint}"

        names = self._description.scores
        known = {name: self.below(name) for name in names}
        return self._find(reference, where, known, {name: (name,) for name in names}, identity)

    def _find(self, reference, where: str, paths: dict, after: dict, identity) -> Found:
        if reference in paths:
            return Found(paths[reference], after[reference])
        if not isinstance(reference, str) or "/" not in reference:
            self._unknown(reference, where, paths)
            return Found(str(reference), ())
        path = str(Path(reference).absolute())
        try:
            return Found(path, (), identity(path))
        except ValueError as error:
            self.data.append(f"{where}: {error}")
            return Found(path, ())

    def _unknown(self, reference: object, where: str, names) -> None:
        near = nearest(reference, names)
        known = ", ".join(names) or "none is described"
        hint = f"did you mean {near}?" if near else f"known: {known}"
        self.settings.append(
            f"{where}: got {reference!r}; {hint} (what exists already is given as a path, with a /)"
        )


def _corpora(description: Pipeline):
    """(name, stages that make it) of every corpus that can be referred to."""
    for name, corpus in description.corpora.items():
        checked = (f"{name}.verify",) if corpus.verify else ()
        yield name, (last_stage_of(name, corpus.jobs), *checked)
        if corpus.held_out_fraction:
            for part in ("train", "held_out"):
                yield f"{name}_{part}", (f"{name}.split", *checked)


def last_stage_of(corpus: str, jobs: int) -> str:
    """The stage after which PREFIX.bin and PREFIX.idx are whole."""
    return f"{corpus}.merge" if jobs > 1 else corpus
