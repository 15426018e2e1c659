"""The part of a save that touches storage: no collective is in it, so that what fails on one rank can be agreed on by all.

megatron-core plans a save together, then writes; but its own order puts files that only rank 0 writes (common.pt,
.metadata, metadata.json) between collectives, and a full disk there leaves the other ranks waiting for ever. Here the
plan is megatron-core's, and so is every byte of the files; the order is ours: `plan_save` (collective, writes nothing),
`RankWriter.start` and `RankWriter.collect` (this rank alone), `RankWriter.finish` (rank 0 alone).
"""

import ctypes
import multiprocessing
import os
import queue
import signal
from dataclasses import dataclass, field
from pathlib import Path

from megatron.core.dist_checkpointing.core import CheckpointingConfig, save_config
from megatron.core.dist_checkpointing.serialization import get_default_save_common_strategy
from megatron.core.dist_checkpointing.state_dict_utils import save_preprocess
from megatron.core.dist_checkpointing.strategies import filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import FileSystemWriterAsync
from megatron.core.dist_checkpointing.strategies.fully_parallel import (
    FullyParallelSaveStrategyWrapper,
)
from megatron.core.dist_checkpointing.strategies.torch import TorchDistSaveShardedStrategy

from megatron_slm.files.atomic import sync_path
from megatron_slm.files.hashing import file_sha256

_FORK = multiprocessing.get_context(
    "fork"
)  # a snapshot of memory: training goes on while it is written
_PR_SET_PDEATHSIG = 1


@dataclass
class Written:
    """What this rank wrote: megatron-core's records of it for .metadata, sha256 by file name, and bytes."""

    records: list = field(default_factory=list)
    checksums: dict[str, str] = field(default_factory=dict)
    size_bytes: int = 0


class _Planning(TorchDistSaveShardedStrategy):
    """megatron-core's planning; in place of its request to write, our RankWriter."""

    def _get_save_and_finalize_callbacks(self, writer, planned):
        return RankWriter(writer, planned[1])


def plan_save(state: dict, folder: Path, group) -> "RankWriter":
    """Agree on who writes what, spread over `group` where ranks hold the same data. Collective; nothing is written yet."""
    # megatron-core would start a manager process per rank, importing the program anew, for a queue that is not used here.
    filesystem_async._results_queue = filesystem_async._results_queue or queue.SimpleQueue()
    sharded, common = save_preprocess(state)
    rank_writer = FullyParallelSaveStrategyWrapper(_Planning("torch_dist", 1), group).async_save(
        sharded, str(folder)
    )
    rank_writer.common = common
    return rank_writer


@dataclass
class RankWriter:
    """This rank's share of one checkpoint: its files are written by forked processes, one per file."""

    writer: FileSystemWriterAsync
    metadata: object | None  # of the whole checkpoint; rank 0 holds it
    common: dict = field(default_factory=dict)
    processes: list = field(default_factory=list)

    def start(self) -> str:
        """Copy what is on a GPU to the host and begin to write; returns what went wrong, "" = nothing."""
        try:
            for bucket in self.writer.preload_tensors(self.writer.write_buckets):
                receiver, sender = _FORK.Pipe(duplex=False)
                process = _FORK.Process(
                    target=_write_file,
                    args=(bucket, [self.writer.transforms], sender, os.getpid()),
                    daemon=True,
                )
                process.start()
                sender.close()  # else the end of the process would not end the pipe
                self.processes.append((process, receiver))
        except Exception as error:  # no memory to copy or fork: this rank's alone, so it must be told and not raised
            return describe_exception(error)
        finally:
            self.writer.write_buckets = []  # the processes have it all; a second copy of the model is not kept
        return ""

    def is_written(self) -> bool:
        """Whether `collect` would not wait."""
        return all(receiver.poll() for _, receiver in self.processes)

    def collect(self) -> tuple[Written, str]:
        """Wait for the processes; (what they wrote, what went wrong)."""
        written, problem = Written(), ""
        for process, receiver in self.processes:
            try:
                records, name, digest, size, failure = receiver.recv()
            except EOFError:
                process.join()
                failure = (
                    f"the process that wrote a file of it ended with exit code {process.exitcode}"
                )
            process.join()
            if failure:
                problem = problem or failure
            else:
                written.records += records
                written.checksums[name] = digest
                written.size_bytes += size
        return written, problem

    def abandon(self) -> None:
        """Stop writing."""
        for process, _ in self.processes:
            process.kill()
            process.join()

    def finish(self, folder: Path, everyone: list[Written]) -> dict[str, str]:
        """Write the files that describe the whole (rank 0 alone); sha256 of every file by name. OSError when storage fails."""
        get_default_save_common_strategy().save_common(self.common, str(folder))
        self.writer.finish(self.metadata, [written.records for written in everyone])
        save_config(CheckpointingConfig("torch_dist", 1), str(folder))
        checksums = {
            name: digest for written in everyone for name, digest in written.checksums.items()
        }
        there = {path.name for path in folder.iterdir()}
        if checksums.keys() - there:
            raise OSError(
                f"{', '.join(sorted(checksums.keys() - there))} written by other ranks cannot be seen in {folder} by rank 0: put the run folder on a shared file system"
            )
        for name in there - checksums.keys():
            sync_path(folder / name)
            checksums[name] = file_sha256(folder / name)
        return checksums


def _write_file(bucket, transforms: list, sender, trainer_process: int) -> None:
    """In a process of its own: write one file, fsync and checksum it, and send the outcome."""
    # A writer never outlives its trainer (SIGKILL when that dies): the restarted run may be writing the same step.
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != trainer_process:
        return
    path, name = Path(bucket[0]), bucket[1]
    outcomes, started = queue.SimpleQueue(), queue.Queue()
    started.put(0)
    FileSystemWriterAsync.write_preloaded_data(
        transforms, 0, bucket, outcomes, started, use_fsync=True
    )
    records, digest, size, problem = outcomes.get()[1], "", 0, ""
    try:
        if isinstance(records, Exception):
            raise records
        sync_path(path)  # megatron-core syncs before it has flushed its last block
        digest, size = file_sha256(path), path.stat().st_size
    except Exception as error:
        records, problem = [], f"{path.name}: {describe_exception(error)}"
    sender.send((records, name, digest, size, problem))


def describe_exception(error: BaseException) -> str:
    """Type and text of an error and of what caused it: torch hides "No space left on device" behind its own."""
    said = [f"{type(error).__name__}: {error}".splitlines()[0]]
    while (error := error.__cause__ or error.__context__) is not None:
        said.append(f"{type(error).__name__}: {error}".splitlines()[0])
    return ", because of ".join(dict.fromkeys(said))
