"""Storage that fails on one rank alone: every rank gives the save up together, nobody waits for
ever, and the next save is whole.
"""

import dataclasses
import errno
import os
import resource
import signal
from contextlib import contextmanager
from pathlib import Path

import pytest

from megatron_slm.config.schema import Config
from megatron_slm.testing.spawn import run_on_cpu

MODES = ("synchronous", "asynchronous")


@contextmanager
def replaced(owner, name, value):
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def no_space(*_, **__):
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@contextmanager
def file_size_limit():
    """A real failure while a weights file is written: the kernel refuses to let it grow."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def failures(rank: int) -> dict:
    """name -> (how to make storage fail on this rank, words of the report)."""
    from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync

    from megatron_slm.checkpoint import folder, writing

    def killed(path):
        os.kill(os.getpid(), signal.SIGKILL)

    def no_memory(*_, **__):
        raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))

    fork = type("Fork", (), {"Process": no_memory, "Pipe": writing._FORK.Pipe})
    return {
        "no folder": (0, lambda: replaced(Path, "mkdir", no_space), "No space left"),
        "weights file": (1, file_size_limit, "File too large"),
        "writer killed": (1, lambda: replaced(writing, "file_sha256", killed), "exit code -9"),
        "no process": (1, lambda: replaced(writing, "_FORK", fork), "Cannot allocate memory"),
        "metadata": (
            0,
            lambda: replaced(FileSystemWriterAsync, "finish", no_space),
            "No space left",
        ),
        "common file": (
            0,
            lambda: replaced(writing, "_write_descriptions", no_space),
            "No space left",
        ),
        "description": (0, lambda: replaced(folder, "write_json", no_space), "No space left"),
        "rename": (0, lambda: replaced(Path, "rename", no_space), "No space left"),
    }


def fail_and_go_on(groups, folder: Path) -> dict:
    return {
        mode: fail_in_every_way(groups, folder / mode, mode == "asynchronous") for mode in MODES
    }


def fail_in_every_way(groups, run: Path, asynchronous: bool) -> list:
    from megatron_slm.checkpoint.folder import (
        CheckpointInfo,
        complete_checkpoints,
        damaged_files,
        step_of,
    )
    from megatron_slm.checkpoint.store import CheckpointStore, trainer_state
    from megatron_slm.model.build import build_model
    from megatron_slm.model.optimizer import build_optimizer, wrap_data_parallel

    config = Config()
    reports = []
    config.model = dataclasses.replace(
        config.model, layers=2, hidden_size=32, ffn_hidden_size=32, attention_heads=2
    )
    config.parallel.distributed_optimizer = True
    models = wrap_data_parallel(build_model(config, 50, groups), config)
    optimizer = build_optimizer(models, config)
    store = CheckpointStore(
        run,
        groups,
        asynchronous=asynchronous,
        report=lambda text, level: reports.append((level, text)),
    )

    def save(step):
        reports.clear()
        store.save(
            models,
            optimizer,
            CheckpointInfo(dataclasses.asdict(config.model), 32, {}, step, 0),
            trainer_state(optimizer, groups, step=step),
        )
        store.finish_pending(wait=True)
        return list(reports)

    outcome = [("first", save(1), "")]
    for number, (name, (rank, failing, expected)) in enumerate(failures(groups.world_rank).items()):
        if groups.world_rank == rank:
            with failing():
                said = save(10 + number)
        else:
            said = save(10 + number)
        found = [step_of(path) for path in complete_checkpoints(store.checkpoints)]
        outcome.append(
            (
                name,
                said,
                expected,
                rank,
                found,
                damaged_files(store.checkpoints / "step_00000001"),
                sorted(path.name for path in store.checkpoints.iterdir()),
            )
        )
    outcome.append(("last", save(99), ""))
    assert store.load_latest(models, optimizer)["step"] == 99
    return outcome


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("failures")


@pytest.fixture(scope="module")
def results(folder):
    return run_on_cpu(fail_and_go_on, folder, dp=2)


def without_times(said: list[tuple[str, str]]) -> list[tuple[str, str]]:
    return [(level, text.split(" MB in")[0]) for level, text in said]


@pytest.mark.parametrize("mode", MODES)
def test_a_failure_on_one_rank_is_given_up_by_all(mode, results, folder):
    by_rank = [rank[mode] for rank in results]
    for ours, theirs in zip(*by_rank, strict=True):
        assert without_times(ours[1]) == without_times(theirs[1]), "all ranks are told the same"
    first, *failed, last = by_rank[0]
    for _, said, _ in (first, last):
        assert [level for level, _ in said if level != "info"] == []
        assert "is complete" in said[-1][1]
    assert len(failed) == 8
    for name, said, expected, rank, found, damaged, files in failed:
        level, text = said[-1]
        assert level == "error", name
        assert "older checkpoints are intact" in text, name
        # The last save of a run that was asked to stop, or of max_failed_saves, fails like this
        # too.
        assert "goes on" not in text, name
        assert expected in text, f"{name}: {text}"
        assert f"rank {rank}" in text, f"{name}: {text}"
        assert found == [1], name
        assert damaged == [], name
        assert files == ["latest", "step_00000001"], name
    assert "99" in (folder / mode / "checkpoints" / "latest").read_text()
