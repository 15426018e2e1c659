"""What verify and inspect_corpus do with a score store: check it against its corpus, score parts of it again, show it as text."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from rich.console import Console
from rich.text import Text

from megatron_slm.data.indexed import CorpusIndex
from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.tokenization import Tokenizer

SHADES = ("", "on grey11", "on grey19", "on grey27", "on dark_red", "on red3")
SHADE_NATS = (0.5, 1.0, 2.0, 4.0, 8.0)


def check_scores(
    folder: str, manifest: CorpusManifest, index: CorpusIndex, console: Console
) -> list[str]:
    """Problems of the store at `folder` as scores of this corpus; reads and hashes all of it. ValueError when it cannot be read."""
    store = ScoreStore.open(folder, allow_missing_scores=True)
    store.check_against(manifest)
    without = store.verify(index.non_empty_starts_tokens())
    if store.missing:
        return [store.describe_missing()]
    console.print(
        f"{folder}: sound. {', '.join(store.columns)} of {store.manifest.corpus_tokens:,} tokens in {store.manifest.dtype}, windows of "
        f"{store.manifest.window_tokens} by {store.manifest.stride_tokens} tokens, documents {store.manifest.document_policy}; reference "
        f"{store.manifest.reference_description}",
        highlight=False,
    )
    for column, count in without.items():
        if count:
            console.print(
                f"note: {count:,} tokens besides the first of each document have no {column}; they are never selected",
                highlight=False,
            )
    return []


def rescore_windows(
    prefix: str, folder: str, reference: str, count: int, tolerance_nats: float, console: Console
) -> list[str]:
    """Score `count` random windows with the reference (our checkpoint, or a Hugging Face folder) and compare with the store."""
    store = ScoreStore.open(folder)
    rescore_with = (
        _rescore_with_transformers
        if (Path(reference) / "config.json").is_file()
        else _rescore_with_checkpoint
    )
    worst = rescore_with(store, prefix, reference, count)
    listed = ", ".join(f"{column} {difference:.2g} nats" for column, difference in worst.items())
    console.print(f"{count} windows scored again: largest difference {listed}", highlight=False)
    return [
        f"{folder}: {column} differs by {difference:.3g} nats from what {reference} gives (allowed: {tolerance_nats}); the scores are of another model "
        "or another context"
        for column, difference in worst.items()
        if difference > tolerance_nats
    ]


def _rescore_with_transformers(
    store: ScoreStore, prefix: str, reference: str, count: int
) -> dict[str, float]:
    import torch

    from megatron_slm.scoring.corpus import TokenStream, rescore
    from megatron_slm.scoring.foreign_model import huggingface_fingerprint
    from megatron_slm.scoring.importers import transformers_runner

    _same_reference(store, huggingface_fingerprint(reference), reference)
    stream = TokenStream(prefix)
    runner = transformers_runner(
        reference,
        stream,
        stream.plan(store.manifest),
        store.columns,
        device="cuda" if torch.cuda.is_available() else "cpu",
        vocabulary_size=CorpusManifest.read(prefix).tokenizer["vocabulary_size"],
    )
    return rescore(runner, store, count)


def _rescore_with_checkpoint(
    store: ScoreStore, prefix: str, reference: str, count: int
) -> dict[str, float]:
    from megatron_slm.device import choose_device

    device = choose_device("auto")  # before anything imports megatron.core
    from megatron_slm.config.schema import DeviceConfig, ParallelConfig
    from megatron_slm.parallel import join_job, leave_job
    from megatron_slm.scoring.corpus import TokenStream, rescore
    from megatron_slm.scoring.model import megatron_runner
    from megatron_slm.scoring.reference import load_scoring_model, open_reference, scoring_config

    opened = open_reference(reference, CorpusManifest.read(prefix))
    _same_reference(store, opened.fingerprint, reference)
    stream = TokenStream(prefix)
    config = scoring_config(
        opened,
        store.manifest.window_tokens,
        ParallelConfig(),
        DeviceConfig(precision=opened.info.precision),
    )
    groups = join_job(config.parallel, device, config.run.seed)
    try:
        runner = megatron_runner(
            load_scoring_model(opened, config, groups),
            groups,
            stream,
            stream.plan(store.manifest),
            store.columns,
            micro_batch_size=4,
        )
        return rescore(runner, store, count)
    finally:
        leave_job()


def _same_reference(store: ScoreStore, fingerprint: str, reference: str) -> None:
    if fingerprint != store.manifest.reference_fingerprint:
        raise ValueError(
            f"{reference} is not the reference of {store.folder}: its fingerprint is {fingerprint[:19]}…, the scores were made by "
            f"{store.manifest.reference_description} ({store.manifest.reference_fingerprint[:19]}…)"
        )


def show_scores(
    store: ScoreStore,
    start: int,
    ids: np.ndarray,
    tokenizer: Tokenizer,
    by_token: bool,
    console: Console,
) -> None:
    """The tokens `ids` at offset `start` with their scores: a line per token, or running text, shaded (terminal) or with numbers (file)."""
    columns = {name: store.read(name, start, len(ids)) for name in store.columns}
    if by_token:
        console.print(
            f"{'offset':>12} {'id':>7} " + " ".join(f"{name:>9}" for name in columns) + " token",
            highlight=False,
        )
        for place, token_id in enumerate(ids.tolist()):
            numbers = " ".join(f"{_number(values[place]):>9}" for values in columns.values())
            console.print(
                f"{start + place:>12} {token_id:>7} {numbers} {tokenizer.piece(token_id)!r}",
                markup=False,
                highlight=False,
            )
        return
    name, losses = next(iter(columns.items()))
    text = Text()
    for token_id, loss in zip(ids.tolist(), losses.tolist(), strict=True):
        if token_id == tokenizer.eod_id:
            continue
        piece = tokenizer.piece(token_id)
        shade = SHADES[int(np.searchsorted(SHADE_NATS, loss))] if loss == loss else "dim"
        text.append(piece if console.is_terminal else f"{piece}[{_number(loss)}]", style=shade)
    console.print(text, soft_wrap=True)
    scored = losses[~np.isnan(losses)]
    mean = (
        f"mean {name} {scored.mean():.3f} nats over {len(scored)} tokens; " if len(scored) else ""
    )
    console.print(
        f"{mean}shades begin at {', '.join(map(str, SHADE_NATS))} nats"
        if console.is_terminal
        else mean.rstrip("; "),
        highlight=False,
    )


def _number(value: float) -> str:
    return "–" if np.isnan(value) else f"{value:.3f}"
