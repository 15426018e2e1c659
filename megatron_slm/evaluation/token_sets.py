"""Frozen sets of a corpus's tokens: the same tokens for every model and every checkpoint, so that
their losses can be compared. Opened without torch.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from megatron_slm.data.corpora import Corpus
from megatron_slm.data.file_array import FileArray, open_npy
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.evaluation.options import TokenSetConfig


@dataclass(frozen=True)
class OpenedSet:
    """A set whose files were opened and checked against its corpus."""

    settings: TokenSetConfig
    mask: FileArray | None
    scores: ScoreStore | None
    minus: ScoreStore | None

    @property
    def name(self) -> str:
        return self.settings.name

    def members(self) -> np.ndarray:
        """bool, one per token of the corpus: whether it belongs to the set. Loads torch for sets
        made from scores, where the rule is `select_top`, so equal scores go by their offset.
        """
        if self.mask is not None:
            return np.array(self.mask[:])
        assert self.scores is not None  # one of the two, by option_problems
        import torch

        from megatron_slm.selection import select_top

        tokens = self.scores.manifest.corpus_tokens
        values = self.scores.read(self.settings.column, 0, tokens)
        if self.minus is not None:
            values = values - self.minus.read(self.settings.column, 0, tokens)
        score = torch.from_numpy(values)
        return select_top(score, score.isfinite(), self.settings.top_fraction).mask.numpy()


def fingerprint_of(members: np.ndarray) -> str:
    """The identity of a set: equal for equal members, whatever they were made from."""
    packed = np.packbits(members).tobytes()
    return "sha256:" + hashlib.sha256(f"{len(members)}\n".encode() + packed).hexdigest()


def open_sets(
    settings: Sequence[TokenSetConfig], corpora: Mapping[str, Corpus], known: set[str]
) -> tuple[dict[str, list[OpenedSet]], list[str]]:
    """The sets by the names of their corpora, and what is wrong with them.

    known: the names of all corpora, of those too that could not be opened.
    """
    opened: dict[str, list[OpenedSet]] = {name: [] for name in corpora}
    problems: list[str] = []
    for each in settings:
        where = f"token_sets {each.name}"
        if each.corpus not in known:
            problems.append(
                f"{where}: got the corpus {each.corpus!r}; expected one of "
                f"{', '.join(sorted(known))}"
            )
        elif each.corpus in corpora:
            try:
                opened[each.corpus].append(_open(each, corpora[each.corpus]))
            except (ValueError, OSError) as error:
                problems.append(f"{where}: {error}")
    return opened, problems


def _open(settings: TokenSetConfig, corpus: Corpus) -> OpenedSet:
    if settings.tokens:
        mask = open_npy(settings.tokens)
        tokens = corpus.manifest.tokens
        if mask.shape != (tokens,) or mask.dtype != np.bool_:
            raise ValueError(
                f"{settings.tokens}: shape {mask.shape}, dtype {mask.dtype}; expected one bool for "
                f"each of the {tokens} tokens of {corpus.prefix}"
            )
        return OpenedSet(settings, mask, None, None)
    scores = _open_store(settings.scores, settings.column, corpus)
    minus = _open_store(settings.minus, settings.column, corpus) if settings.minus else None
    return OpenedSet(settings, None, scores, minus)


def _open_store(folder: str, column: str, corpus: Corpus) -> ScoreStore:
    store = ScoreStore.open(folder)
    store.check_against(corpus.manifest)
    if column not in store.columns:
        raise ValueError(f"{folder} has no column {column!r}; it has {', '.join(store.columns)}")
    return store
