"""kill -9 at random moments: one rank or both, in a step, a save, a validation or a resume. No
checkpoint and no loss value is lost.

The ranks are forked from one process that has imported everything, so that a start costs a second
and not ten. Two kills by default; SLM_KILLS=20 kills twenty times.
"""

import multiprocessing
import os
import random
import signal
import time
from pathlib import Path

from megatron_slm.testing.corpora import random_documents, write_corpus
from megatron_slm.testing.spawn import warm_context
from tests.distributed.test_resume import VOCABULARY, records

CASE = dict(precision="bf16", scorer="own_loss", scope="running_threshold", dropout=0.0)
STEPS = 24
PATIENCE_SECONDS = 240


def rank_of_a_start(rank: int, folder: Path, run: str, asynchronous: bool, store: Path) -> None:
    """One rank of one start of the run; the process ends here, however it ends."""
    import torch

    from megatron_slm.config.schema import ParallelConfig
    from megatron_slm.device import choose_device
    from megatron_slm.parallel import join_job
    from tests.distributed import test_resume as runs

    torch.set_num_threads(1)
    runs.STEPS = STEPS
    try:
        groups = join_job(
            ParallelConfig(),
            choose_device("cpu"),
            1234,
            timeout_minutes=5,
            store=torch.distributed.FileStore(str(store), 2),
            rank=rank,
            world_size=2,
        )
        runs.train(groups, folder, run, {**CASE, "asynchronous": asynchronous})
        os._exit(0)
    except BaseException:  # the other rank was killed: this one ends too, as torchrun would make it
        os._exit(1)


def start(folder: Path, run: str, asynchronous: bool, number: int) -> list:
    fork = multiprocessing.get_context("fork")
    ranks = [
        fork.Process(
            target=rank_of_a_start,
            args=(rank, folder, run, asynchronous, folder / f"store_{number}"),
        )
        for rank in range(2)
    ]
    for process in ranks:
        process.start()
    return ranks


def wait(ranks: list, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))


def newest(folder: Path, run: str) -> int:
    """Step of the newest checkpoint, 0 = none; it and the one that `latest` names must be whole."""
    from megatron_slm.checkpoint.folder import (
        complete_checkpoints,
        damaged_files,
        resolve_checkpoint,
        step_of,
    )

    checkpoints = folder / run / "checkpoints"
    found = complete_checkpoints(checkpoints)
    pointers = [
        resolve_checkpoint(checkpoints / name)
        for name in ("latest", "best")
        if (checkpoints / name).exists()
    ]
    assert all(path in found and damaged_files(path) == [] for path in [*found[-1:], *pointers])
    return step_of(found[-1]) if found else 0


def kill_again_and_again(folder: Path, kills: int, outcome) -> None:
    """In a process that imports everything once: an uninterrupted run, then runs that are killed
    until `kills` are done.
    """
    from megatron_slm.device import choose_device

    choose_device("cpu")
    from megatron_slm.training import (  # noqa: F401  imported here, once, for all that are forked
        loop,
        setup,
    )

    begun = time.monotonic()
    wait(start(folder, "whole", False, 0), PATIENCE_SECONDS)
    duration = time.monotonic() - begun
    moments = random.Random(0)
    done = 0
    starts = 0
    run = "run_0"
    before = 0
    reached = []
    while done < kills:
        starts += 1
        ranks = start(folder, run, moments.random() < 0.5, starts)
        wait(ranks, moments.uniform(0.1, 0.8) * duration)
        doomed = moments.choice([ranks, ranks[:1], ranks[1:]])
        if all(process.exitcode == 0 for process in ranks):
            assert records(folder / run) == records(folder / "whole")
            run = f"run_{starts}"
            before = 0
            continue
        for process in doomed:
            if process.is_alive():
                os.kill(process.pid, signal.SIGKILL)
        wait(ranks, PATIENCE_SECONDS)
        assert not any(process.is_alive() for process in ranks), "a rank waits for a dead one"
        done += 1
        after = newest(folder, run)
        assert after >= before, "a checkpoint was lost"
        before = after
        reached.append(after)
    last = start(folder, run, True, starts + 1)
    wait(last, PATIENCE_SECONDS)
    assert [process.exitcode for process in last] == [0, 0]
    assert records(folder / run) == records(folder / "whole")
    outcome.send((done, reached))


def test_kills_at_random_moments_lose_nothing(tmp_path):
    write_corpus(
        tmp_path / "corpus",
        random_documents(200, 20, vocabulary_size=VOCABULARY),
        vocabulary_size=VOCABULARY,
    )
    kills = int(os.environ.get("SLM_KILLS", 2))
    receiver, sender = multiprocessing.Pipe(duplex=False)
    process = warm_context().Process(target=kill_again_and_again, args=(tmp_path, kills, sender))
    process.start()
    process.join()
    assert process.exitcode == 0, "see the assertion above"
    done, reached = receiver.recv()
    print(f"{done} kills; newest checkpoint after each: {reached}")
    assert done == kills
