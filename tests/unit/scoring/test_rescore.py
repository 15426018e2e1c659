"""Scoring a corpus again and comparing with what is stored."""

import numpy as np
import pytest

from megatron_slm.scoring.corpus import rescore
from megatron_slm.testing.corpora import random_documents, write_corpus, write_scores


class StoredScores:
    """Gives the stored values back, as an exact reference would, with one token's changed."""

    def __init__(self, store, token: int, value: float):
        self.store = store
        self.token = token
        self.value = value

    def score_range(self, start: int, end: int) -> dict[str, np.ndarray]:
        values = self.store.read("loss", start, end - start).copy()
        if start <= self.token < end:
            values[self.token - start] = self.value
        return {"loss": values}


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    folder = tmp_path_factory.mktemp("rescore")
    write_corpus(folder / "corpus", random_documents(8, 6))
    return write_scores(folder / "scores", folder / "corpus")


def first_and_last_scored(store) -> tuple[int, int]:
    """A first token of a document (no score), and a token with a score."""
    values = store.read("loss", 0, store.manifest.corpus_tokens)
    return int(np.flatnonzero(np.isnan(values))[1]), int(np.flatnonzero(np.isfinite(values))[-1])


def test_equal_scores_do_not_differ(store):
    assert rescore(StoredScores(store, -1, 0.0), store, count=20) == {"loss": 0.0}


def test_a_different_score_is_measured_in_nats(store):
    _, scored = first_and_last_scored(store)
    again = float(store.read("loss", scored, 1)[0]) + 0.25
    assert rescore(StoredScores(store, scored, again), store, count=60) == {"loss": 0.25}


def test_a_score_that_is_only_stored_differs_without_bound(store):
    _, scored = first_and_last_scored(store)
    assert rescore(StoredScores(store, scored, np.nan), store, count=60) == {"loss": np.inf}


def test_a_score_that_is_not_stored_differs_without_bound(store):
    unscored, _ = first_and_last_scored(store)
    assert rescore(StoredScores(store, unscored, 1.0), store, count=60) == {"loss": np.inf}
