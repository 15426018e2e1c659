"""Whether stored scores are of a corpus, and of the context in which it is trained. No torch."""

from pathlib import Path

from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_manifest import ScoreManifest

_SEEN_UNDER = {
    "packed": "packed, where a token also sees the document before its own",
    "isolated": "isolated, where it sees its own only",
}


def check_same_corpus(folder: Path, scores: ScoreManifest, corpus: CorpusManifest) -> None:
    """ValueError unless the scores in `folder` are of exactly this corpus and its tokenizer."""
    compared = {
        "tokens": (scores.corpus_tokens, corpus.tokens),
        "documents": (scores.corpus_documents, corpus.documents),
        "corpus fingerprint": (scores.corpus_fingerprint, corpus.fingerprint),
        "tokenizer fingerprint": (scores.tokenizer_fingerprint, corpus.tokenizer["fingerprint"]),
    }
    problems = [
        f"{name}: the scores have {of_scores}, the training data {of_corpus}"
        for name, (of_scores, of_corpus) in compared.items()
        if of_scores != of_corpus
    ]
    if problems:
        raise ValueError(
            f"The scores in {folder} are of another corpus or tokenizer. "
            + "; ".join(problems)
            + ". Score this corpus again: torchrun -m megatron_slm.score --checkpoint RUN "
            "--corpus C --output S"
        )


def context_differences(
    folder: Path, scores: ScoreManifest, sequence_length: int, document_policy: str
) -> list[str]:
    """How the context in which tokens were scored differs from the one they are trained in.

    The excess loss then compares losses under different contexts: docs/method.md#point-13.
    """
    warnings = []
    if scores.window_tokens != sequence_length:
        warnings.append(
            f"{folder}: tokens were scored in windows of {scores.window_tokens} tokens and are "
            f"trained in sequences of {sequence_length}: the excess loss compares different "
            f"contexts. Score again with --window-tokens {sequence_length} to remove the "
            "difference."
        )
    if scores.document_policy != document_policy:
        warnings.append(
            f"{folder}: documents were scored {_SEEN_UNDER[scores.document_policy]}, and are "
            f"trained {_SEEN_UNDER[document_policy]}: the excess loss compares different contexts. "
            f"Score again with --document-policy {document_policy}, or train with "
            f"--data.document_policy {scores.document_policy}, to compare like with like."
        )
    return warnings
