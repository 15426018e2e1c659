"""The part of a save that touches storage: no collective is in it, so that what fails on one rank
can be agreed on by all.

megatron-core plans a save together, then writes; but its own order puts files that only rank 0
writes (common.pt, .metadata, metadata.json) between collectives, and a full disk there leaves the
other ranks waiting for ever. Here the plan is megatron-core's, and so is every byte of the files;
the order is ours: `plan_save` (collective, writes nothing), `RankWriter.start` and
`RankWriter.collect` (this rank alone), `RankWriter.finish` (rank 0 alone).
"""

import ctypes
import gc
import json
import multiprocessing
import os
import queue
import shutil
import signal
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_slm.checkpoint.folder import FORMATS
from megatron_slm.core_versions import planned_save_arguments
from megatron_slm.files.atomic import sync_path
from megatron_slm.files.hashing import file_sha256

# A forked process has a snapshot of memory, so training goes on while the snapshot is written.
_FORK = multiprocessing.get_context("fork")
_PR_SET_PDEATHSIG = 1


@dataclass
class Written:
    """What one rank wrote."""

    records: list[Any] = field(default_factory=list)
    """megatron-core's, for .metadata."""
    checksums: dict[str, str] = field(default_factory=dict)
    """sha256 by file name."""
    size_bytes: int = 0


class _Planning(TorchDistSaveShardedStrategy):
    """megatron-core's planning, which returns our RankWriter where it would request a write."""

    def _get_save_and_finalize_callbacks(
        self, writer: FileSystemWriterAsync, planned: tuple[Any, Any], *_: str
    ) -> "RankWriter":
        return RankWriter(writer, planned[1])


def prepare_folder(folder: Path) -> str:
    """Let rank 0 make an empty folder to write in; returns the error, "" = none."""
    if dist.get_rank() != 0:
        return ""
    try:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
    except OSError as error:
        return describe_exception(error)
    return ""


def plan_save(state: dict[str, Any], folder: Path, group: dist.ProcessGroup) -> "RankWriter":
    """Agree on who writes what, spread over `group` where ranks hold the same data.

    Collective; nothing is written yet.
    """
    # megatron-core would start a manager process per rank, importing the program anew, for a queue
    # that is not used here.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.SimpleQueue()
    sharded, common = save_preprocess(state)
    strategy = FullyParallelSaveStrategyWrapper(_Planning("torch_dist", 1), group)
    rank_writer = strategy.async_save(sharded, str(folder), *planned_save_arguments())
    rank_writer.common = common
    return rank_writer


@dataclass
class RankWriter:
    """What one rank writes of a checkpoint: its files, each by a forked process of its own."""

    writer: FileSystemWriterAsync
    metadata: Any
    """megatron-core's description of the whole checkpoint; None on all ranks but 0."""
    common: dict[str, Any] = field(default_factory=dict)
    """What every rank has alike; rank 0 writes it."""
    processes: list[tuple[ForkProcess, Connection]] = field(default_factory=list)
    """The writing processes, and the pipes that their outcomes come through."""

    def start(self) -> str:
        """Copy what is on a GPU to the host and begin to write; returns what went wrong, "" =
        nothing.
        """
        try:
            for bucket in self.writer.preload_tensors(self.writer.write_buckets):
                receiver, sender = _FORK.Pipe(duplex=False)
                process = _FORK.Process(
                    target=_write_file,
                    args=(bucket, [self.writer.transforms], sender, os.getpid()),
                    daemon=True,
                )
                _fork_without_collecting(process)
                # Close our copy of the write end, or recv() never sees EOF when the child dies.
                sender.close()
                self.processes.append((process, receiver))
        except Exception as error:
            # No memory to copy or to fork, perhaps on this rank only: the error is returned, so
            # that all ranks can agree to abandon the save.
            return describe_exception(error)
        finally:
            # The processes have a snapshot of it; a second copy of the model is not kept.
            self.writer.write_buckets = []
        return ""

    def is_written(self) -> bool:
        """Whether `collect` would return without waiting."""
        return all(receiver.poll() for _, receiver in self.processes)

    def collect(self) -> tuple[Written, str]:
        """Wait for the processes; (what they wrote, what went wrong)."""
        written = Written()
        problems = []
        for process, receiver in self.processes:
            try:
                of_file, problem = receiver.recv()
            except EOFError:
                process.join()
                of_file = Written()
                problem = (
                    f"the process that wrote a file of it ended with exit code {process.exitcode}"
                )
            process.join()
            if problem:
                problems.append(problem)
            written.records += of_file.records
            written.checksums |= of_file.checksums
            written.size_bytes += of_file.size_bytes
        return written, problems[0] if problems else ""

    def abandon(self) -> None:
        """Stop writing."""
        for process, _ in self.processes:
            process.kill()
            process.join()

    def finish(self, folder: Path, by_rank: list[Written]) -> dict[str, str]:
        """Write the files that describe the whole (rank 0 alone); sha256 of every file by name.

        OSError when storage fails.
        """
        _write_descriptions(folder, self.common)
        self.writer.finish(self.metadata, [written.records for written in by_rank])
        checksums: dict[str, str] = {}
        for written in by_rank:
            checksums |= written.checksums
        names = {path.name for path in folder.iterdir()}
        if unseen := checksums.keys() - names:
            raise OSError(
                f"{', '.join(sorted(unseen))} written by other ranks cannot be seen in {folder} by "
                "rank 0: put the run folder on a shared file system"
            )
        for name in names - checksums.keys():
            sync_path(folder / name)
            checksums[name] = file_sha256(folder / name)
        return checksums


def _fork_without_collecting(process: ForkProcess) -> None:
    """Start the process with Python's garbage collector off in it.

    Cyclic garbage of the trainer may hold process groups and CUDA objects. Their threads were not
    forked, and destroying them without these ends in a segmentation fault.
    """
    collects = gc.isenabled()
    gc.disable()
    try:
        process.start()
    finally:
        if collects:
            gc.enable()


def _write_descriptions(folder: Path, common: dict[str, Any]) -> None:
    """The two files that megatron-core 0.16.1 writes beside the sharded ones; 0.19.2 reads them."""
    torch.save(common, folder / "common.pt")
    (folder / "metadata.json").write_text(json.dumps(FORMATS))


def _write_file(
    bucket: tuple[Any, ...], transforms: list[Any], sender: Connection, trainer_process: int
) -> None:
    """In a process of its own: write one file, fsync and checksum it, and send the outcome."""
    # The kernel kills this process when its trainer dies: the restarted run may be writing the same
    # step.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer_process:
        return
    path = Path(bucket[0])
    name = bucket[1]
    outcomes: queue.SimpleQueue[Any] = queue.SimpleQueue()
    started: queue.Queue[int] = queue.Queue()
    started.put(0)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, outcomes, started, use_fsync=True
    )
    records = outcomes.get()[1]
    try:
        if isinstance(records, Exception):
            raise records
        sync_path(path)  # megatron-core syncs before it has flushed its last block
        written = Written(records, {name: file_sha256(path)}, path.stat().st_size)
        problem = ""
    except Exception as error:
        written = Written()
        problem = f"{path.name}: {describe_exception(error)}"
    sender.send((written, problem))


def describe_exception(error: BaseException) -> str:
    """Type and first line of an error, and of the errors that caused it: torch hides "No space left
    on device" behind an error of its own.
    """
    descriptions = []
    cause: BaseException | None = error
    while cause is not None:
        descriptions.append(f"{type(cause).__name__}: {cause}".splitlines()[0])
        cause = cause.__cause__ or cause.__context__
    return ", because of ".join(dict.fromkeys(descriptions))
