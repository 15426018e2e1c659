"""launch/preprocess.sbatch, run by bash with stand-ins."""

import signal

import pytest

from megatron_slm.files.atomic import write_json_atomically


def test_preprocess_reads_env_sh(cluster):
    """The container that it names starts the program."""
    container = cluster.folder / "bin" / "apptainer"
    container.write_text('#!/bin/bash\nprintf "%s\\n" "$*" >> "$SCRATCH/apptainer.log"\n')
    container.chmod(0o755)
    own = cluster.folder / "own_env.sh"
    own.write_text('SLM_CONTAINER=(apptainer exec)\nsource "$SLM_ROOT/launch/env.sh"\n')
    code, output = cluster.run(
        "preprocess.sbatch",
        work="0",
        SLM_ENV=str(own),
        SLM_INPUT="text/*.jsonl",
        SLM_TOKENIZER="vocabulary.model",
        SLM_OUTPUT="data/corpus",
        SLURM_ARRAY_TASK_ID="3",
        SLURM_ARRAY_TASK_COUNT="8",
    )
    assert code == 0, output
    assert cluster.log("apptainer") == [
        "exec python -m data_tools.preprocess --input text/*.jsonl --tokenizer vocabulary.model "
        "--output-prefix data/corpus --shard 3/8 --workers 64"
    ]


def task(cluster) -> dict[str, str]:
    return {
        "SLM_INPUT": "text/*.jsonl",
        "SLM_TOKENIZER": "vocabulary.model",
        "SLM_OUTPUT": str(cluster.folder / "corpus"),
        "SLURM_ARRAY_JOB_ID": "123450",
        "SLURM_ARRAY_TASK_ID": "3",
        "SLURM_ARRAY_TASK_COUNT": "8",
        "WHEN_ASKED": "143",
    }


def save_documents(cluster, documents: int) -> None:
    """What data_tools/writer.py writes."""
    partial = cluster.folder / "corpus.shard-00003-of-00008.partial"
    partial.mkdir(exist_ok=True)
    progress = {"identity": {"documents": 9}, "documents": documents, "sizes": {}}
    write_json_atomically(partial / "progress.json", progress)


@pytest.mark.parametrize(
    "before, after, requeued",
    [(0, 40, ["requeue 123450_3"]), (30, 40, ["requeue 123450_3"]), (40, 40, [])],
)
def test_near_the_limit_a_task_that_saved_documents_is_requeued(cluster, before, after, requeued):
    save_documents(cluster, before)
    process = cluster.start("preprocess.sbatch", work="stall", **task(cluster))
    cluster.wait_for("started", process)
    save_documents(cluster, after)
    process.send_signal(signal.SIGUSR1)
    output, _ = process.communicate(timeout=60)
    assert (process.returncode, cluster.requeued()) == (0 if requeued else 85, requeued), output
    assert ("made no progress (at document 40)" in output) == (not requeued)


def test_a_task_that_slurm_ends_is_left_to_slurm(cluster):
    code, output = cluster.run(
        "preprocess.sbatch", work="stall", send=signal.SIGTERM, RESTARTS="1", **task(cluster)
    )
    assert (code, cluster.requeued()) == (85, []), output
    assert "SLURM has put the job back into the queue, where it continues" in output


def test_its_own_exit_codes_are_the_tasks(cluster):
    for wanted in (0, 3, 4):
        assert cluster.run("preprocess.sbatch", work=str(wanted), **task(cluster))[0] == wanted
    assert not cluster.requeued()
