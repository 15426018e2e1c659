"""launch/preprocess.sbatch and launch/score.sbatch as arrays on a real SLURM.

Tasks are killed and stopped on the way.
"""

import os
import signal
import sys
from pathlib import Path

import pytest

from tests.end_to_end.small_run import command, run_to_end
from tests.slurm.cluster import Cluster, Job

pytestmark = pytest.mark.slow


def tasks_of(job: Job, count: int) -> list[Job]:
    """The tasks of an array, which share its log."""
    return [Job(job.cluster, f"{job.number}_{index}", job.log) for index in range(count)]


def test_preprocess_array_and_merge_give_the_corpus_of_one_run(cluster, corpus, tmp_path):
    variables = {
        "SLM_INPUT": f"{corpus}/*.jsonl",
        "SLM_TOKENIZER": f"{corpus}/tok.model",
        "SLM_OUTPUT": f"{tmp_path}/text",
    }
    script = ["--cpus-per-task=1", "launch/preprocess.sbatch"]
    array = cluster.submit("--array=0-1", *script, **variables)
    merge = cluster.submit(
        f"--dependency=afterok:{array.number}", *script, SLM_MERGE="1", SLM_SHARDS="2", **variables
    )
    assert merge.wait_for_end() == "COMPLETED", array.text + merge.text
    for suffix in (".bin", ".idx"):
        merged = Path(f"{tmp_path}/text{suffix}")
        whole = Path(f"{corpus}/text{suffix}")
        assert merged.read_bytes() == whole.read_bytes()


@pytest.fixture(scope="module")
def reference(corpus, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("reference") / "run"
    run_to_end(command(corpus, run, "--schedule.train_steps", "2", processes=1))
    return run


def scoring(reference: Path, corpus: Path, output: Path) -> list[str]:
    words = ["--checkpoint", str(reference), "--corpus", f"{corpus}/text", "--output", str(output)]
    return [*words, "--shard_tokens", "256", "--micro_batch_size", "4"]


@pytest.fixture(scope="module")
def whole_store(reference, corpus) -> bytes:
    """The scores that one process writes, never interrupted."""
    store = reference.parent / "scores"
    run_to_end([sys.executable, "-m", "megatron_slm.score", *scoring(reference, corpus, store)])
    return (store / "loss.bin").read_bytes()


def submit(cluster: Cluster, arguments: list[str], *options: str) -> Job:
    return cluster.submit("--time=20", *options, "launch/score.sbatch", *arguments)


def finished(store: Path) -> list[Path]:
    return list(store.glob("shards/shard_*.json"))


def test_a_score_array_with_a_killed_task_ends_as_one_run(
    cluster, corpus, tmp_path, reference, whole_store
):
    arguments = scoring(reference, corpus, tmp_path / "scores")
    array = submit(cluster, arguments, "--array=0-1")
    first, second = tasks_of(array, 2)
    array.wait_for(lambda: len(finished(tmp_path / "scores")) > 2, "a finished shard")
    [process] = first.processes("megatron_slm.score")
    os.kill(process, signal.SIGKILL)
    assert (first.wait_for_end(), first.exit_code) == ("FAILED", 137), array.text
    assert second.wait_for_end() == "COMPLETED", array.text
    again = submit(cluster, arguments, "--array=0-1")
    for task in tasks_of(again, 2):
        assert task.wait_for_end() == "COMPLETED", again.text
    assert (tmp_path / "scores" / "loss.bin").read_bytes() == whole_store


def test_scoring_on_two_nodes_is_stopped_with_85_and_requeued(
    cluster, corpus, tmp_path, reference, whole_store
):
    job = submit(cluster, scoring(reference, corpus, tmp_path / "scores"), "--nodes=2")
    [task] = tasks_of(job, 1)
    job.wait_for(lambda: len(finished(tmp_path / "scores")) > 2, "a finished shard")
    task.warn()
    assert task.wait_for_end() == "COMPLETED", job.text
    assert (task.exit_code, task.restarts) == (0, 1), job.text
    assert "processes.py: exit code 85" in job.text
    assert "requeueing job" in job.text
    assert (tmp_path / "scores" / "loss.bin").read_bytes() == whole_store
