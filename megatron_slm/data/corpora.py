"""Corpora and the scores of their tokens, opened and compared without torch."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar

from megatron_slm.data.indexed import open_index
from megatron_slm.data.manifest import CorpusManifest, check_corpus
from megatron_slm.data.score_store import ScoreStore

Opened = TypeVar("Opened")


@dataclass(frozen=True)
class Corpus:
    """One checked corpus: files whole and unchanged, scores (if any) of exactly these tokens."""

    prefix: str
    manifest: CorpusManifest
    scores: ScoreStore | None = None


def too_few_tokens(corpus: Corpus, sequence_length: int) -> str:
    """Why a corpus gives no sample of this length; "" when it gives one."""
    tokens = corpus.manifest.tokens
    if tokens > sequence_length:
        return ""
    return (
        f"{corpus.prefix} has {tokens} tokens, too few for one sample of sequence_length + 1 = "
        f"{sequence_length + 1}. Use a larger corpus or a shorter data.sequence_length."
    )


def nothing_counts(corpus: Corpus) -> str:
    """Why no token of a corpus can be trained on or measured; "" when one can."""
    if open_index(f"{corpus.prefix}.idx").has_trainable_tokens():
        return ""
    return (
        f"{corpus.prefix} has {corpus.manifest.tokens} tokens in {corpus.manifest.documents} "
        "documents, none of more than one token: the first token of a document has no loss that "
        "counts, because nothing before it explains it. Look at the text it was made of: "
        f"python -m data_tools.inspect_corpus {corpus.prefix} --document 0"
    )


class UnusableData(ValueError):
    """Everything that is wrong with corpora, and apart from it with their score stores."""

    def __init__(self, corpora: list[str], scores: list[str]):
        super().__init__("\n".join(corpora + scores))
        self.corpora = corpora
        self.scores = scores


def open_corpora(
    prefixes: Sequence[str],
    scores: Sequence[str] = (),
    *,
    tokenizer: Mapping[str, Any] | None = None,
    allow_missing_scores: bool = False,
) -> list[Corpus]:
    """Open corpora and their score stores (one per corpus, same order, or none).

    UnusableData lists every problem found. tokenizer: the entry of the tokenizer that all corpora
    must have been made with.
    """
    if scores and len(scores) != len(prefixes):
        problem = (
            f"{len(scores)} score stores were given for {len(prefixes)} training corpora; give one "
            "per corpus, in the same order."
        )
        raise UnusableData([], [problem])
    of_corpora: list[str] = []
    of_scores: list[str] = []
    manifests = [
        _or_problem(of_corpora, partial(check_corpus, prefix, tokenizer=tokenizer))
        for prefix in prefixes
    ]
    stores = [
        _or_problem(
            of_scores, partial(ScoreStore.open, folder, allow_missing_scores=allow_missing_scores)
        )
        for folder in scores
    ]
    of_scores += _stores_of_other_corpora(prefixes, manifests, stores)
    sets = {store.columns for store in stores if store}
    if len(sets) > 1:
        of_scores.append(
            f"The score stores have different columns: {sorted(sets)}; every corpus of a blend "
            "needs the same."
        )
    if of_corpora or of_scores:
        raise UnusableData(of_corpora, of_scores)
    opened = []
    for prefix, manifest, store in zip(
        prefixes, manifests, stores or [None] * len(prefixes), strict=True
    ):
        assert manifest is not None  # else there was a problem
        opened.append(Corpus(str(prefix), manifest, store))
    return opened


def _or_problem(problems: list[str], opened: Callable[[], Opened]) -> Opened | None:
    try:
        return opened()
    except ValueError as error:
        problems.append(str(error))
        return None


def _stores_of_other_corpora(
    prefixes: Sequence[str],
    manifests: Sequence[CorpusManifest | None],
    stores: Sequence[ScoreStore | None],
) -> list[str]:
    """One sentence per store of another corpus than the one in its place.

    One for all of them when they are only out of order.
    """
    fingerprints = [manifest.fingerprint if manifest else None for manifest in manifests]
    scored = [store.manifest.corpus_fingerprint if store else None for store in stores]
    if None not in [*fingerprints, *scored] and fingerprints != scored:
        folder_of = {s.manifest.corpus_fingerprint: str(s.folder) for s in stores if s}
        if folder_of.keys() == set(fingerprints) and len(folder_of) == len(stores):
            in_order = ", ".join(folder_of[name] for name in fingerprints if name)
            return [
                "The score stores are in another order than the corpora. Give them in this one: "
                f"[{in_order}]"
            ]
    problems = []
    for number, store in enumerate(stores):
        manifest = manifests[number]
        if store is None or manifest is None:
            continue
        if scored[number] != fingerprints[number] and scored[number] in fingerprints:
            owner = prefixes[fingerprints.index(scored[number])]
            problems.append(
                f"The scores in {store.folder} are those of {owner}, and stand in the place of "
                f"{prefixes[number]}: give one store per corpus, in the order of the corpora."
            )
            continue
        try:
            store.check_against(manifest)
        except ValueError as error:
            problems.append(str(error))
    return problems
