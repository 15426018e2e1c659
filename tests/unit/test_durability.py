"""Whatever is renamed into place is on disk before, and its new name is on disk afterwards.

Without this a power cut can leave a complete-looking corpus, score store, checkpoint or export
whose files are empty.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from megatron_slm.checkpoint.folder import CheckpointInfo, complete, point_to, writing_folder
from megatron_slm.convert import huggingface
from megatron_slm.data.epoch_index import build_once
from megatron_slm.data.score_store import ScoreStore
from megatron_slm.testing.corpora import random_documents, score_manifest, write_corpus
from megatron_slm.testing.disk import recorded_disk_events


@dataclass(frozen=True)
class Numbers:
    values: np.ndarray


def write_a_score_store(folder: Path) -> None:
    manifest = score_manifest(write_corpus(folder / "corpus", random_documents(4, 8)))
    store = ScoreStore.create(folder / "scores", manifest)
    for shard in range(manifest.shard_count):
        start, end = manifest.shard_range(shard)
        store.write_shard(shard, {"loss": np.zeros(end - start)})
    assert store.finish()


def write_a_checkpoint(folder: Path) -> None:
    info = CheckpointInfo({}, 64, {}, 1, 64, precision="fp32")
    for _ in range(2):  # the second time it replaces the first
        writing_folder(folder, 1).mkdir(parents=True)
        point_to(complete(folder, 1, info, {"step": 1}, {}), "best")


def write_an_export(folder: Path) -> None:
    (folder / "writing").mkdir()
    (folder / "writing" / "config.json").write_text("{}")
    huggingface._replace(folder / "writing", folder / "export")


def write_an_index(folder: Path) -> None:
    build_once(folder / "index", Numbers, lambda: Numbers(np.arange(3)))


@pytest.mark.parametrize(
    "write", [write_a_score_store, write_a_checkpoint, write_an_export, write_an_index]
)
def test_files_are_on_disk_before_their_names_and_names_before_the_end(write, tmp_path):
    with recorded_disk_events() as events:
        write(tmp_path)
    assert events.unsynced_renames == []
    if write is not write_an_index:  # an index that is lost is built again
        assert events.unsynced_names == {}
