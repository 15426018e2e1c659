"""How far the training data of a run has been read, corpus by corpus: how a checkpoint stores it,
and how a change of settings affects it.

An arrangement is what decides which sample comes n-th: the corpora in their order, their weights,
the sequence length and the seed. As long as it stays, the position is one number, whatever the
batch size and the layout. When it changes, the samples read of each corpus are counted, and the new
arrangement begins there. No torch.
"""

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any


def is_count(value: object) -> bool:
    """Whether a value from a file is a whole number, at least 0."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


@dataclass(frozen=True)
class Stretch:
    """Samples of a corpus that were read one after the other, with one sequence length and seed."""

    sequence_length: int
    seed: int
    samples: int


def add_stretch(past: Sequence[Stretch], stretch: Stretch) -> tuple[Stretch, ...]:
    """`past` and then `stretch`, joined to the last one if it continues in the same order."""
    if not stretch.samples:
        return tuple(past)
    if past and past[-1] == replace(stretch, samples=past[-1].samples):
        return (*past[:-1], replace(stretch, samples=past[-1].samples + stretch.samples))
    return (*past, stretch)


@dataclass(frozen=True)
class CorpusPosition:
    """One corpus, known by its content, and what was read of it before the present arrangement."""

    prefix: str
    fingerprint: str
    past: tuple[Stretch, ...] = ()


@dataclass(frozen=True)
class DataPosition:
    """An arrangement, and how many of its samples were read."""

    sequence_length: int
    seed: int
    weights: tuple[float, ...]
    """One per corpus, as the blend takes them; empty for a single corpus."""
    corpora: tuple[CorpusPosition, ...]
    left_out: tuple[CorpusPosition, ...] = ()
    """Corpora of earlier arrangements, should they come back."""
    samples: int = 0

    @property
    def pasts(self) -> list[tuple[Stretch, ...]]:
        return [corpus.past for corpus in self.corpora]

    def moved_to(
        self, wanted: "DataPosition", count: Callable[[tuple[float, ...], int], Sequence[int]]
    ) -> "DataPosition":
        """This position under the arrangement of `wanted`, each corpus where it was; the same one
        when nothing has changed.

        wanted: a position nothing was read at. count(weights, samples): how many of the first
        samples of a blend are of each corpus. A corpus is recognized by its content, whatever
        its path; equal corpora are matched in their order.
        """
        if self._arrangement == wanted._arrangement:
            return replace(wanted, corpora=self._renamed(wanted), **self._kept)
        counts = count(self.weights, self.samples)
        earlier = [
            replace(
                corpus,
                past=add_stretch(corpus.past, Stretch(self.sequence_length, self.seed, read)),
            )
            for corpus, read in zip(self.corpora, counts, strict=True)
        ]
        earlier += self.left_out
        corpora = []
        for corpus in wanted.corpora:
            same = [before for before in earlier if before.fingerprint == corpus.fingerprint][:1]
            if same:
                earlier.remove(same[0])
            corpora.append(replace(corpus, past=same[0].past if same else ()))
        return replace(wanted, corpora=tuple(corpora), left_out=tuple(earlier))

    def changes(self, wanted: "DataPosition") -> list[str]:
        """What `moved_to` does to the order of the data, one sentence each."""
        if self._arrangement == wanted._arrangement:
            return []
        read = {corpus.fingerprint for corpus in (*self.corpora, *self.left_out)}
        now = {corpus.fingerprint for corpus in wanted.corpora}
        sentences = [
            f"data.train: {corpus.prefix} is new in this run and is read from its beginning"
            for corpus in wanted.corpora
            if corpus.fingerprint not in read
        ]
        sentences += [
            f"data.train: {corpus.prefix} is left out from here on; should it come back, it goes "
            "on where it was"
            for corpus in self.corpora
            if corpus.fingerprint not in now
        ]
        if (self.sequence_length, self.seed) != (wanted.sequence_length, wanted.seed):
            sentences.append(
                "the data is read in another order (sequence length "
                f"{self.sequence_length} and seed {self.seed} before, {wanted.sequence_length} and "
                f"{wanted.seed} now): what is left of the present epoch of each corpus is cut anew"
                ", so that no token of it is read twice"
            )
        return sentences or [
            "the blend of data.train has changed: each corpus goes on where it was"
        ]

    def to_json(self) -> dict:
        return asdict(self)

    @classmethod
    def from_json(cls, stored: dict) -> "DataPosition":
        """What to_json gave, read from a checkpoint. KeyError, TypeError or ValueError when it is
        something else.
        """
        read = {
            "weights": tuple(stored["weights"]),
            "corpora": tuple(map(_corpus_from_json, stored["corpora"])),
            "left_out": tuple(map(_corpus_from_json, stored["left_out"])),
        }
        position = cls(**{**stored, **read})
        lengths = [position.sequence_length]
        counts = [position.samples]
        for corpus in (*position.corpora, *position.left_out):
            lengths += [stretch.sequence_length for stretch in corpus.past]
            counts += [stretch.samples for stretch in corpus.past]
        if not all(map(is_count, lengths + counts)) or 0 in lengths:
            raise ValueError(f"{position} has what is no count")
        return position

    @property
    def _arrangement(self) -> tuple[Any, ...]:
        contents = tuple(corpus.fingerprint for corpus in self.corpora)
        return self.sequence_length, self.seed, self.weights, contents

    @property
    def _kept(self) -> dict:
        return {"left_out": self.left_out, "samples": self.samples}

    def _renamed(self, wanted: "DataPosition") -> tuple[CorpusPosition, ...]:
        """The corpora under the names they have now."""
        return tuple(
            replace(renamed, past=corpus.past)
            for renamed, corpus in zip(wanted.corpora, self.corpora, strict=True)
        )


def _corpus_from_json(stored: dict) -> CorpusPosition:
    past = tuple(Stretch(**stretch) for stretch in stored["past"])
    return CorpusPosition(**{**stored, "past": past})
