"""Corpora and the scores of their tokens, opened and compared; no torch, so what is wrong is said at once."""

from collections.abc import Sequence
from dataclasses import dataclass

from megatron_slm.data.manifest import CorpusManifest, check_corpus
from megatron_slm.data.score_store import ScoreStore


@dataclass(frozen=True)
class Corpus:
    """One checked corpus: files whole and unchanged, scores (if any) of exactly these tokens."""

    prefix: str
    manifest: CorpusManifest
    scores: ScoreStore | None = None


def open_corpora(
    prefixes: Sequence[str],
    scores: Sequence[str] = (),
    *,
    tokenizer_fingerprint: str | None = None,
    allow_missing_scores: bool = False,
) -> list[Corpus]:
    """Open corpora and their score stores (one per corpus, same order, or none). ValueError lists every problem found."""
    problems, corpora = [], []
    if scores and len(scores) != len(prefixes):
        raise ValueError(
            f"{len(scores)} score stores were given for {len(prefixes)} training corpora; give one per corpus, in the same order."
        )
    for prefix, folder in zip(prefixes, list(scores) or [None] * len(prefixes)):
        try:
            manifest = check_corpus(prefix, tokenizer_fingerprint=tokenizer_fingerprint)
            store = None
            if folder is not None:
                store = ScoreStore.open(folder, allow_missing_scores=allow_missing_scores)
                store.check_against(manifest, tokenizer_fingerprint)
            corpora.append(Corpus(str(prefix), manifest, store))
        except ValueError as error:
            problems.append(str(error))
    sets = {corpus.scores.columns for corpus in corpora if corpus.scores}
    if len(sets) > 1:
        problems.append(
            f"The score stores have different columns: {sorted(sets)}; every corpus of a blend needs the same."
        )
    if problems:
        raise ValueError("\n".join(problems))
    return corpora
