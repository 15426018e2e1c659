"""The part of the preflight that needs every process.

It looks at devices, versions, clocks, files on all nodes, and whether all groups answer.

Not yet run on GPUs over NCCL: the tests run it on CPU processes over gloo.
"""

import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from megatron_slm.checkpoint.folder import read_checkpoint_info
from megatron_slm.config.schema import Config
from megatron_slm.model.build import resolve_layers
from megatron_slm.parallel import Groups
from megatron_slm.planning.hardware import find_gpu
from megatron_slm.planning.job import Job
from megatron_slm.planning.memory import rank_memory
from megatron_slm.training import preflight, preflight_files
from megatron_slm.training.preflight import BAD_SETTINGS, FINE, Facts, Finding
from megatron_slm.training.preflight_facts import facts
from megatron_slm.training.preflight_page import write_page
from megatron_slm.training.setup import RunInputs

Value = TypeVar("Value")
ANSWER_SECONDS = 300.0
"""How long the first exchange of all groups may take; setting up thousands of NCCL connections
takes a minute or two.
"""
CPU_PAYLOAD_BYTES = 4 << 20
GPU_PAYLOAD_BYTES = 64 << 20
ROUNDS = 3
KINDS = ("tp", "pp", "dp", "cp", "ep")


def check_job(
    config: Config,
    groups: Groups,
    run_inputs: RunInputs | None,
    file_findings: list[Finding],
    *,
    thorough: bool,
) -> list[Finding]:
    """All findings, the same on every process.

    run_inputs and file_findings (of preflight_files.check_files) are those of rank 0. Where a group
    does not answer, every process of it prints so and ends with exit code 2. thorough: also time an
    exchange in every group. Collective.
    """
    local = int(os.environ.get("LOCAL_RANK", groups.world_rank))
    with Deadline(ANSWER_SECONDS, f"rank {groups.world_rank} on {socket.gethostname()}", groups):
        from_rank_0: tuple[list[str], str] = ([], "")
        if run_inputs is not None:
            from_rank_0 = (preflight_files.files_of(run_inputs), _new_file(config))
        paths, new_file = _from_first(from_rank_0)
        own_facts = facts(config, groups, paths if local == 0 else [], new_file)
        if groups.world_size > 1:
            dist.barrier()  # so that all read their clocks at one moment
        everyone = _everyone(replace(own_facts, clock_seconds=time.time()))
        answers = _everyone(reach(groups))
        rates = _everyone(bandwidth(groups)) if thorough else []
    if new_file and groups.world_rank == 0:
        Path(new_file).unlink(missing_ok=True)
    findings = list(file_findings)
    if run_inputs is not None:
        findings += preflight.compare(everyone)
        findings.append(planned_memory(config, groups, run_inputs.vocabulary_size, everyone))
        findings += groups_that_answer(answers, everyone)
        findings += preflight.slow_groups(_by_kind(rates))
        findings += write_page(findings, Path(config.run.folder))
    return _from_first(findings)


def reach(groups: Groups) -> dict[str, tuple[list[int], bool]]:
    """Per kind of group with several members: its ranks, and whether a sum over them is right.

    Reported by the first member of each group, and by every member whose sum is wrong.
    """
    answers = {}
    for kind in KINDS:
        group = getattr(groups, kind)
        if group.size() > 1:
            ranks = dist.get_process_group_ranks(group)
            summed = torch.full((1,), groups.world_rank, dtype=torch.int64, device=groups.device)
            dist.all_reduce(summed, group=group)
            is_right = summed.item() == sum(ranks)
            if group.rank() == 0 or not is_right:
                answers[kind] = (ranks, is_right)
    return answers


def bandwidth(groups: Groups) -> dict[str, tuple[list[int], float]]:
    """Per kind of group with several members: its ranks, and the bytes per second that an
    all-reduce moves through each.

    Measured by all members, reported by the first one of each group.
    """
    rates = {}
    payload_bytes = GPU_PAYLOAD_BYTES if groups.device.type == "cuda" else CPU_PAYLOAD_BYTES
    payload = torch.zeros(payload_bytes // 4, device=groups.device)
    for kind in KINDS:
        group = getattr(groups, kind)
        if group.size() > 1:
            dist.all_reduce(payload, group=group)  # the first one allocates
            _finish(groups.device)
            started = time.monotonic()
            for _ in range(ROUNDS):
                dist.all_reduce(payload, group=group)
            _finish(groups.device)
            elapsed_seconds = time.monotonic() - started
            moved_bytes = ROUNDS * payload_bytes * 2 * (group.size() - 1) / group.size()
            if group.rank() == 0:
                ranks = dist.get_process_group_ranks(group)
                rates[kind] = (ranks, moved_bytes / elapsed_seconds)
    return rates


def groups_that_answer(
    answers: list[dict[str, tuple[list[int], bool]]], everyone: list[Facts]
) -> list[Finding]:
    """One finding for all groups: which kinds there are, or which sums were wrong."""
    wrong = [
        f"{kind} of ranks {ranks} ({everyone[rank].host})"
        for rank, answer in enumerate(answers)
        for kind, (ranks, is_right) in answer.items()
        if not is_right
    ]
    if wrong:
        advice = "a sum over the group is wrong; do not train on this network or these devices: "
        return [Finding("groups", BAD_SETTINGS, advice + "; ".join(wrong[:8]))]
    sizes = {kind: len(ranks) for answer in answers for kind, (ranks, _) in answer.items()}
    named = ", ".join(f"{kind} of {size}" for kind, size in sizes.items())
    return [Finding("groups", FINE, f"{named} answer" if named else "one process, no group")]


def planned_memory(
    config: Config, groups: Groups, vocabulary_size: int, everyone: list[Facts]
) -> Finding:
    """Compares the planned memory of this job with the smallest device."""
    on_gpu = groups.device.type == "cuda"
    gpu = find_gpu(everyone[0].device) or preflight_files.NO_GPU
    reference = None
    if config.selection.reference.checkpoint:
        reference = read_checkpoint_info(config.selection.reference.checkpoint).reference_model()
    job = Job(
        config,
        vocabulary_size,
        replace(gpu, memory_bytes=min(planned.device_bytes for planned in everyone)),
        1,
        groups.world_size,
        fused=on_gpu and resolve_layers(config, on_gpu) == "transformer_engine",
        reference=reference,
    )
    stages = [rank_memory(job, stage) for stage in range(config.parallel.pipeline)]
    state = max(planned.weights + planned.gradients + planned.optimizer for planned in stages)
    return preflight.memory(state, max(planned.total for planned in stages), everyone)


class Deadline:
    """A context manager that ends the process with exit code 2 when its block takes too long.

    A process that waits in a collective for an unreachable one cannot act on anything else.
    """

    def __init__(
        self, seconds: float, who: str, groups: Groups, end: Callable[[int], None] = os._exit
    ):
        self.who = who
        self.groups = groups
        self.end = end
        self.seconds = seconds
        self._timer = threading.Timer(seconds, self._give_up)
        self._timer.daemon = True

    def __enter__(self) -> "Deadline":
        self._timer.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._timer.cancel()

    def _give_up(self) -> None:
        variable = (
            "NCCL_SOCKET_IFNAME" if self.groups.device.type == "cuda" else "GLOO_SOCKET_IFNAME"
        )
        members = {kind: dist.get_process_group_ranks(getattr(self.groups, kind)) for kind in KINDS}
        named = "; ".join(f"{kind}: {ranks}" for kind, ranks in members.items() if len(ranks) > 1)
        print(
            f"train: {self.who}: the processes of its groups ({named}) did not all answer "
            f"within {self.seconds:.0f} s. Look for a process that failed first, a firewall, or "
            f"the wrong network interface ({variable} in launch/env.sh)",
            file=sys.stderr,
            flush=True,
        )
        self.end(2)


def _new_file(config: Config) -> str:
    """A file in the run folder that all nodes must see.

    All of them write their parts of the checkpoints there.
    """
    folder = Path(config.run.folder).absolute()
    path = folder / f".preflight_{os.getpid()}_{time.time_ns()}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for left_by_a_kill in folder.glob(".preflight_*"):
            left_by_a_kill.unlink(missing_ok=True)
        path.write_text("seen")
    except OSError:  # the first checkpoint will report it better
        return ""
    return str(path)


def _finish(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _everyone(value: Value) -> list[Value]:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return [value]
    gathered: list = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return gathered


def _from_first(value: Value) -> Value:
    if not dist.is_initialized() or dist.get_world_size() == 1:
        return value
    held = [value]
    dist.broadcast_object_list(held, src=0)
    return held[0]


def _by_kind(
    rates: list[dict[str, tuple[list[int], float]]],
) -> dict[str, dict[tuple[int, ...], float]]:
    """kind -> ranks of a group -> its rate."""
    by_kind: dict[str, dict[tuple[int, ...], float]] = {}
    for of_rank in rates:
        for kind, (ranks, rate) in of_rank.items():
            by_kind.setdefault(kind, {})[tuple(ranks)] = rate
    return by_kind
