"""launch/score.sbatch, run by bash with stand-ins: shares, signals, requeue decisions."""

import signal

ARRAY = {
    "SLURM_ARRAY_JOB_ID": "123450",
    "SLURM_ARRAY_TASK_ID": "3",
    "SLURM_ARRAY_TASK_COUNT": "8",
    "SLURM_ARRAY_TASK_MIN": "0",
    "SLURM_ARRAY_TASK_MAX": "7",
}


def test_each_scoring_job_takes_its_share(cluster):
    code, output = cluster.run(
        "score.sbatch", "--checkpoint", "runs/reference", "--output", "scores", work="0", **ARRAY
    )
    assert code == 0, output
    assert cluster.log("python")[0].endswith(
        "-m megatron_slm.score --checkpoint runs/reference --output scores --shard 3/8"
    )


def test_shares_need_all_array_ids(cluster):
    code, output = cluster.run(
        "score.sbatch", "--output=scores", work="0", **{**ARRAY, "SLURM_ARRAY_TASK_MIN": "2"}
    )
    assert code == 2
    assert "without gaps" in output
    code, output = cluster.run("score.sbatch", "--corpus", "c", work="0", CHECKED="3", **ARRAY)
    assert (code, cluster.log("python")) == (3, []), output
    assert "nothing was started: the check of settings and inputs ended with exit code 3" in output


def test_scoring_is_stopped_and_requeued_when_shards_were_finished(cluster):
    store = cluster.environment["STORE"]
    arguments = ("score.sbatch", "--output", store)
    code, output = cluster.run(*arguments, work="score", send=signal.SIGUSR1, **ARRAY)
    assert cluster.log("signals") == ["asked"]
    # The number alone would mean all tasks of the array.
    assert cluster.log("scancel") == ["--signal=USR1 123450_3"]
    assert code == 0, output
    assert cluster.requeued() == ["requeue 123450_3"], output
    code, output = cluster.run(*arguments, work="score", send=signal.SIGUSR1, **ARRAY)
    assert code == 85
    assert len(cluster.requeued()) == 1
    assert "made no progress" in output
    # A shard of another share is no progress of this one.
    code, output = cluster.run(
        *arguments, work="score", send=signal.SIGUSR1, SHARD="000012", **ARRAY
    )
    assert code == 85
    assert len(cluster.requeued()) == 1
    assert "made no progress" in output
