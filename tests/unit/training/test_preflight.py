"""What the facts of several nodes say when held against each other: refused, warned of, or fine."""

import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from megatron_slm.config.load import from_mapping
from megatron_slm.data.corpora import Corpus
from megatron_slm.data.manifest import check_corpus
from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.training import preflight, preflight_files
from megatron_slm.training.preflight import (
    BAD_DATA,
    BAD_SETTINGS,
    FINE,
    WARNING,
    Facts,
    Finding,
    PreflightFailed,
)
from megatron_slm.training.preflight_files import DiskNeed

VERSIONS = {"torch": "2.13.0", "NCCL": "2.27.5", "python": "3.11.7", "settings": "abc"}
ONE = Facts(
    rank=0,
    host="node1",
    device="cuda NVIDIA H100 80GB HBM3",
    device_id="GPU-0",
    device_bytes=80 * 10**9,
    taken_bytes=10**9,
    clock_seconds=1000.0,
    versions=VERSIONS,
    files={"data/text.bin": 100},
)
NODES = [
    ONE,
    replace(ONE, rank=1, device_id="GPU-1", files={}),
    replace(ONE, rank=2, host="node2", clock_seconds=1000.2),
    replace(ONE, rank=3, host="node2", device_id="GPU-1", files={}),
]


def found(changes: dict, rank: int = 2) -> list[Finding]:
    """What is not fine when the process of `rank` differs from the others in `changes`."""
    everyone = [replace(each, **changes) if each.rank == rank else each for each in NODES]
    return [each for each in preflight.compare(everyone) if each.state != FINE]


def test_nodes_that_agree_are_fine():
    assert found({}) == []


@pytest.mark.parametrize(
    ("changes", "state", "words"),
    [
        (
            {"versions": VERSIONS | {"torch": "2.12.1"}},
            BAD_SETTINGS,
            "2.13.0 on node1, node2; 2.12.1 on node2",
        ),
        ({"versions": VERSIONS | {"NCCL": "2.26"}}, BAD_SETTINGS, "2.26 on node2"),
        ({"versions": VERSIONS | {"settings": "x"}}, BAD_SETTINGS, "one configuration file"),
        ({"versions": VERSIONS | {"python": "3.11.9"}}, WARNING, "3.11.9 on node2"),
        ({"device": "cpu"}, BAD_SETTINGS, "some processes have a GPU and others none"),
        ({"device": "cuda NVIDIA A100"}, WARNING, "the slowest sets the pace"),
        ({"device_id": "GPU-1"}, BAD_SETTINGS, "ranks [2, 3] on node2 share GPU GPU-1"),
        ({"taken_bytes": 40 * 10**9}, WARNING, "40 GB of 80 GB on the device of rank 2 (node2)"),
        ({"clock_seconds": 1060.0}, WARNING, "node2 is 60.0 s ahead of that of node1"),
        ({"files": {"data/text.bin": -1}}, BAD_DATA, "100 bytes on node1, but not there on node2"),
        ({"files": {"data/text.bin": 99}}, BAD_DATA, "but 99 bytes on node2"),
        ({"sees_run_folder": False}, BAD_SETTINGS, "is not seen on node2"),
    ],
    ids=lambda value: str(value)[:30],
)
def test_a_node_that_differs_is_named(changes, state, words):
    (finding,) = found(changes)
    assert finding.state == state
    assert words in finding.sentence


def test_a_thousand_nodes_are_not_all_listed():
    everyone = [replace(ONE, rank=n, host=f"n{n}", device_id="") for n in range(1000)]
    everyone[0] = replace(everyone[0], versions=VERSIONS | {"torch": "2.12"})
    (finding,) = [each for each in preflight.compare(everyone) if each.state != FINE]
    assert "n1, n2, n3, n4 and 995 more" in finding.sentence


@pytest.mark.parametrize(
    ("state_bytes", "peak_bytes", "state"),
    [(30, 60, FINE), (60, 90, WARNING), (90, 95, BAD_SETTINGS)],
)
def test_the_plan_is_held_against_the_smallest_device(state_bytes, peak_bytes, state):
    nodes = [ONE, replace(ONE, rank=1, host="small", device_bytes=79 * 10**9)]
    finding = preflight.memory(state_bytes * 10**9, peak_bytes * 10**9, nodes)
    assert finding.state == state
    assert "rank 1 on small has 79 GB" in finding.sentence


def test_a_slow_group_is_told_by_its_ranks():
    rates = {"tp": {(0, 1): 200e9, (2, 3): 210e9, (4, 5): 20e9}, "dp": {(0, 2): 40e9}}
    slow, fine = preflight.slow_groups(rates)
    assert (slow.check, slow.state) == ("group tp", WARNING)
    assert "ranks [4, 5] have 20 GB/s" in slow.sentence
    assert (fine.check, fine.state) == ("group dp", FINE)


@pytest.mark.parametrize(
    ("free", "state"), [(1000, FINE), (500, WARNING), (99, BAD_SETTINGS), (0, BAD_SETTINGS)]
)
def test_free_disk_is_held_against_what_will_be_written(free, state):
    needs = [checkpoints(900), DiskNeed("the sample indices take", Path("run"), 10, 10)]
    finding = preflight_files.disk_finding(needs, free)
    assert finding.state == state
    named = "one checkpoint takes 0.1 kB, the sample indices take 0.01 kB." in finding.sentence
    assert named == (state == BAD_SETTINGS)


def checkpoints(whole_bytes: int) -> DiskNeed:
    return DiskNeed("one checkpoint takes", Path("run"), whole_bytes, 100)


def test_a_run_that_has_written_everything_needs_no_room():
    assert preflight_files.disk_finding([checkpoints(0)], 0).state == FINE


def test_the_disk_of_a_run_that_cannot_save_is_refused(tmp_path):
    config, _ = from_mapping(
        {
            "run": {"folder": str(tmp_path / "run")},
            "model": {"layers": 1000, "hidden_size": 65536},
            "schedule": {"train_steps": 10},
        }
    )
    manifest = SimpleNamespace(tokens=10_000, documents=10)
    corpora = [SimpleNamespace(prefix="text", manifest=manifest, scores=None)]
    run_inputs = SimpleNamespace(corpora=corpora, validation={}, vocabulary_size=1000)
    with pytest.raises(PreflightFailed, match="one checkpoint takes .* TB") as caught:
        preflight.raise_if_fatal(preflight_files.check_files(config, run_inputs, 1))
    assert caught.value.exit_code == 2


def test_a_run_that_is_done_needs_no_room(tmp_path, monkeypatch):
    done = SimpleNamespace(remaining_steps=0)
    monkeypatch.setattr(preflight_files, "planned_length", lambda config: done)
    monkeypatch.setattr(preflight_files, "disk_finding", lambda needs: pytest.fail("it was asked"))
    config, _ = from_mapping({"run": {"folder": str(tmp_path)}, "schedule": {"train_steps": 10}})
    run_inputs = SimpleNamespace(corpora=[], validation={}, vocabulary_size=1000)
    disk, _ = preflight_files.check_files(config, run_inputs, 1)
    assert (disk.check, disk.state) == ("disk", FINE)


class Store:
    """Scores of two shards, of which the second is damaged; the third was never made."""

    folder, columns = Path("scores"), ("loss",)
    manifest, missing = SimpleNamespace(shard_count=3), {2}

    def verify(self, shards):
        if 1 in shards:
            raise ValueError("scores/loss.bin: shard 1 is not the bytes that were written")


def test_a_damaged_score_store_is_bad_data():
    manifest = SimpleNamespace(tokens=10_000, documents=10)
    corpora = [SimpleNamespace(prefix="text", manifest=manifest, scores=Store())]
    run_inputs = SimpleNamespace(corpora=corpora, validation={}, vocabulary_size=1000)
    config, _ = from_mapping({"schedule": {"train_steps": 1}})
    findings = preflight_files.check_files(config, run_inputs, 1, thorough=True)
    with pytest.raises(PreflightFailed, match="not the bytes that were written") as caught:
        preflight.raise_if_fatal(findings)
    assert caught.value.exit_code == 3


def test_a_corpus_that_lost_a_block_is_bad_data(tmp_path):
    prefix = tmp_path / "text"
    manifest = write_corpus(prefix, random_documents(40, 30, vocabulary_size=100))
    check_corpus(prefix)
    tokens = Path(f"{prefix}.bin")
    before = tokens.stat()
    tokens.write_bytes(bytes(before.st_size))
    os.utime(tokens, ns=(before.st_atime_ns, before.st_mtime_ns))
    corpora = [Corpus(str(prefix), manifest)]
    run_inputs = SimpleNamespace(corpora=corpora, validation={}, vocabulary_size=1000)
    config, _ = from_mapping({"schedule": {"train_steps": 1}})
    with pytest.raises(PreflightFailed, match="no longer what they were") as caught:
        preflight.raise_if_fatal(preflight_files.check_files(config, run_inputs, 1))
    assert caught.value.exit_code == 3


def test_indices_grow_with_epochs():
    config, _ = from_mapping(
        {
            "schedule": {"train_steps": 100},
            "data": {"global_batch_size": 8, "sequence_length": 100},
        }
    )
    corpus = SimpleNamespace(manifest=SimpleNamespace(tokens=10_000, documents=10))
    one_epoch = 4 * 10 + 24 * 100
    assert preflight_files.index_bytes(config, [corpus]) == 8 * one_epoch
    both = preflight_files.index_bytes(config, [corpus, corpus])
    assert both == 800 * 10 + 2 * 4 * one_epoch


def test_warnings_go_to_the_sinks_and_do_not_refuse():
    findings = [Finding("clocks", WARNING, "apart"), Finding("disk", FINE, "much")]
    preflight.raise_if_fatal(findings)
    assert preflight.warning_messages(findings) == [("preflight, clocks: apart", "warning")]


def test_settings_come_before_data_in_the_exit_code():
    both = PreflightFailed([Finding("disk", BAD_DATA, "x"), Finding("memory", BAD_SETTINGS, "y")])
    assert both.exit_code == 2
    assert "2 problems" in str(both)
