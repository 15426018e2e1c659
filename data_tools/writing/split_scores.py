"""The scores of a corpus follow its documents into the two parts that `split` makes.

No part needs to be scored again.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np

from megatron_slm.data.manifest import CorpusManifest
from megatron_slm.data.score_manifest import default_shard_tokens
from megatron_slm.data.score_store import ScoreStore


def open_scores(
    folders: list[str], corpus: CorpusManifest, output_prefixes: list[str]
) -> list[ScoreStore]:
    """The complete stores of this corpus.

    Raises ValueError with a sentence, also when a folder that would be written exists.
    """
    stores = [ScoreStore.open(path) for path in folders]
    if len({store.folder.name for store in stores}) != len(stores):
        raise ValueError(
            "--scores: two folders of one name would be written to one place; rename one"
        )
    for store in stores:
        store.check_against(corpus)
        for prefix in output_prefixes:
            folder = scores_of_part(prefix, store)
            if folder.exists():
                raise ValueError(
                    f"{folder} exists already. Delete it, or give another --output-prefix."
                )
    return stores


def scores_of_part(prefix: str, store: ScoreStore) -> Path:
    """The folder of the scores of the part at `prefix`.

    Of data/split_train and the store scores/corpus_scores it is data/split_train.corpus_scores.
    """
    return Path(f"{prefix}.{store.folder.name}")


def carried_before(folder: str, prefix: str, part: CorpusManifest) -> bool:
    """Whether an earlier call has given the part at `prefix` all scores of the store `folder`."""
    store = ScoreStore.open(folder)
    part_folder = scores_of_part(prefix, store)
    if not (part_folder / "manifest.json").exists():
        return False
    carried = ScoreStore.open(part_folder, allow_missing_scores=True)
    return (
        carried.manifest.complete
        and carried.manifest.corpus_fingerprint == part.fingerprint
        and carried.manifest.reference_fingerprint == store.manifest.reference_fingerprint
    )


def carry_scores(
    store: ScoreStore, prefix: str, part: CorpusManifest, runs: np.ndarray
) -> ScoreStore:
    """A store of the corpus `part` with the scores of its documents.

    runs: int64 [R, 2], the token ranges [start, end) of the whole corpus that make up the part, in
    its order. The scores stay those of the context that the tokens had in the whole corpus, and the
    description states this: scoring the part again gives other values near the beginnings of
    documents.
    """
    manifest = replace(
        store.manifest,
        corpus_fingerprint=part.fingerprint,
        corpus_tokens=part.tokens,
        corpus_documents=part.documents,
        shard_tokens=default_shard_tokens(part.tokens),
        resume_command="",
        complete=False,
        reference_description=f"{store.manifest.reference_description}; split from {store.folder}, "
        "scored in the whole corpus",
    )
    made = ScoreStore.create(scores_of_part(prefix, store), manifest)
    ends = np.cumsum(runs[:, 1] - runs[:, 0])
    begins = ends - (runs[:, 1] - runs[:, 0])
    for shard in range(manifest.shard_count):
        low, high = manifest.shard_range(shard)
        first = np.searchsorted(ends, low, side="right")
        last = np.searchsorted(begins, high, side="left")
        starts = runs[first:last, 0] + np.maximum(low - begins[first:last], 0)
        stops = runs[first:last, 1] - np.maximum(ends[first:last] - high, 0)
        pieces = list(zip(starts.tolist(), stops.tolist(), strict=True))
        made.write_shard(
            shard, {column: store.read_pieces(column, pieces) for column in store.columns}
        )
    made.finish()
    return made
