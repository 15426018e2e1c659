"""A score store as verify checks it against its corpus, and as inspect_corpus shows it."""

from __future__ import annotations

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_slm.data.indexed import CorpusIndex
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.tokenization import Tokenizer

SHADES = ("", "on grey11", "on grey19", "on grey27", "on dark_red", "on red3")
SHADE_NATS = (0.5, 1.0, 2.0, 4.0, 8.0)
"""Where each shade but the first begins."""


def problems_of_scores(
    folder: str, manifest: CorpusManifest, index: CorpusIndex, console: Console
) -> list[str]:
    """Problems of the store at `folder` as scores of this corpus; all of it is read and hashed.

    Raises ValueError when the store cannot be read or belongs to another corpus.
    """
    store = ScoreStore.open(folder, allow_missing_scores=True)
    store.check_against(manifest)
    without_score = store.verify(index.non_empty_starts_tokens())
    if store.missing:
        return [store.describe_missing()]
    scored = store.manifest
    console.print(
        f"{folder}: sound. {', '.join(store.columns)} of {scored.corpus_tokens:,} tokens in "
        f"{scored.dtype}, windows of {scored.window_tokens} by {scored.stride_tokens} tokens, "
        f"documents {scored.document_policy}; reference {scored.reference_description}",
        highlight=False,
    )
    for column, count in without_score.items():
        if count:
            console.print(
                f"note: {count:,} tokens besides the first of each document have no {column}; "
                "they are never selected",
                highlight=False,
            )
    return []


def show_scored_tokens(
    store: ScoreStore, start: int, ids: np.ndarray, tokenizer: Tokenizer, console: Console
) -> None:
    """Print a line with all scores for each of the tokens `ids`, which begin at token `start`."""
    columns = {name: store.read(name, start, len(ids)) for name in store.columns}
    titles = " ".join(f"{name:>9}" for name in columns)
    console.print(f"{'offset':>12} {'id':>7} {titles} token", highlight=False)
    for place, token_id in enumerate(ids.tolist()):
        scores = " ".join(f"{_score_text(values[place]):>9}" for values in columns.values())
        console.print(
            f"{start + place:>12} {token_id:>7} {scores} {tokenizer.piece(token_id)!r}",
            markup=False,
            highlight=False,
        )


def show_scored_text(
    store: ScoreStore, start: int, ids: np.ndarray, tokenizer: Tokenizer, console: Console
) -> None:
    """Print the tokens `ids`, which begin at token `start`, as text with the first column's scores.

    A terminal shows them as shades of the background, a file as numbers.
    """
    name = store.columns[0]
    losses = store.read(name, start, len(ids))
    text = Text()
    for token_id, loss in zip(ids.tolist(), losses.tolist(), strict=True):
        if token_id == tokenizer.eod_id:
            continue
        piece = tokenizer.piece(token_id)
        shade = "dim" if np.isnan(loss) else SHADES[int(np.searchsorted(SHADE_NATS, loss))]
        text.append(piece if console.is_terminal else f"{piece}[{_score_text(loss)}]", style=shade)
    console.print(text, soft_wrap=True)
    scored = losses[~np.isnan(losses)]
    notes = []
    if len(scored):
        notes.append(f"mean {name} {scored.mean():.3f} nats over {len(scored)} tokens")
    if console.is_terminal:
        notes.append(f"shades begin at {', '.join(map(str, SHADE_NATS))} nats")
    console.print("; ".join(notes), highlight=False)


def _score_text(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
