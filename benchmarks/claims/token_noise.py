"""Does the excess loss find planted tokens? On the corpus `words`, real documents in which one word
in seven was replaced, ranked by a trained arm's loss minus its reference's.
"""

import json
from pathlib import Path

import numpy as np

from benchmarks.claims.commands import corpus_prefix, vocabulary_file
from benchmarks.claims.corpora import SPANS
from benchmarks.claims.graph import Graph, folder_of
from benchmarks.claims.noise import WORDS
from benchmarks.claims.runner import is_done
from megatron_slm.data.indexed import open_index, open_tokens
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.tokenization import load_tokenizer
from megatron_slm.tokenization.token_bytes import token_bytes

REJECTED = 0.4
"""Share of the tokens that is rejected: those with the lowest scores, as at a keep fraction of 0.6.
"""


def found_tokens(graph: Graph, arm: str, folder: Path) -> dict[str, float]:
    """Precision and recall of rejecting; empty where this arm is not measured so, or not yet."""
    if arm not in graph.experiment.token_noise:
        return {}
    trained = graph.trained_scores(arm)
    reference = graph.scores(graph.experiment.token_noise[arm], WORDS)
    if not (is_done(trained, folder) and is_done(reference, folder)):
        return {}
    corpus = graph.corpus(WORDS)
    text = folder_of(corpus.needs[0], folder)
    planted = planted_tokens(
        corpus_prefix(corpus, folder),
        vocabulary_file(graph.tokenizer, folder),
        text / f"{WORDS}.jsonl",
        json.loads((text / SPANS).read_text()),
    )
    losses = []
    for stage in (trained, reference):
        losses.append(_losses(folder_of(stage, folder), len(planted)))
    return detection(losses[0] - losses[1], planted)


def _losses(store: Path, tokens: int) -> np.ndarray:
    return ScoreStore.open(store).read("loss", 0, tokens).astype(np.float32)


def planted_tokens(
    prefix: Path, vocabulary: Path, text: Path, spans: dict[str, list[list[int]]]
) -> np.ndarray:
    """bool [tokens of the corpus]: tokens of which a byte is planted.

    ValueError when the corpus is not the tokens of the text.
    """
    sizes = token_bytes(load_tokenizer(str(vocabulary)))
    index = open_index(f"{prefix}.idx")
    tokens = open_tokens(prefix, index)
    starts = index.document_starts_tokens()
    marks = np.zeros(index.tokens, bool)
    with text.open(encoding="utf-8") as lines:
        for number, record in enumerate(map(json.loads, lines)):
            first, last = int(starts[number]), int(starts[number + 1])
            ends = np.cumsum(sizes[tokens[first:last]])
            added = int(ends[-1]) - len(record["text"].encode())
            if added not in (0, 1):  # the space that vocabularies begin a text with
                raise ValueError(f"{prefix}: document {number} is not that of {text}")
            marks[first:last] = overlaps(ends - added, spans[record["id"]])
    return marks


def overlaps(ends: np.ndarray, spans: list[list[int]]) -> np.ndarray:
    """bool [tokens]: whether a token's bytes, up to ends[i], lie in one of the ascending spans."""
    begins = np.concatenate([[0], ends[:-1]])
    if not spans:
        return np.zeros(len(ends), bool)
    places = np.array(spans)
    following = np.searchsorted(places[:, 1], begins, side="right")  # the first that ends later
    inside = following < len(places)
    return inside & (places[np.minimum(following, len(places) - 1), 0] < ends)


def detection(score: np.ndarray, planted: np.ndarray) -> dict[str, float]:
    """Precision and recall of rejecting the lowest scores, and the share of planted tokens, which
    is the precision of rejecting at random. Tokens without a score do not count.
    """
    known = np.isfinite(score)
    score, planted = score[known], planted[known]
    order = np.argsort(score, kind="stable")
    rejected = planted[order[: round(REJECTED * len(score))]]
    return {
        "precision": round(float(rejected.mean()), 5),
        "recall": round(float(rejected.sum() / max(planted.sum(), 1)), 5),
        "planted_fraction": round(float(planted.mean()), 5),
    }
