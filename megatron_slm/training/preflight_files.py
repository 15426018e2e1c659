"""The part of the preflight that rank 0 does alone, before the processes join: disks and data."""

import os
import random
from collections import defaultdict
from dataclasses import dataclass, replace
from pathlib import Path

from megatron_slm.config.schema import Config
from megatron_slm.config.sizes import train_steps
from megatron_slm.data.corpora import Corpus
from megatron_slm.data.verified import check_sample
from megatron_slm.planning.hardware import GPU
from megatron_slm.planning.job import Job
from megatron_slm.planning.result import checkpoint_bytes, checkpoints_on_disk
from megatron_slm.training.preflight import (
    BAD_DATA,
    BAD_SETTINGS,
    FINE,
    WARNING,
    Finding,
    describe_size,
)
from megatron_slm.training.resume import planned_length
from megatron_slm.training.setup import RunInputs, index_cache

NO_GPU = GPU("none", 1.0, 1.0, 1.0, 1.0, 1.0, 1.0)
"""Stands for the GPU in a plan of which only sizes are used."""
SAMPLED_SHARDS = 3
"""Shards checked of each score store by --preflight. A run checks one, another at every start.
"""

BLOCKS_PER_SHARD = 4
"""Blocks of every corpus that are read for each shard of scores that is read; blocks are
smaller."""


def check_files(
    config: Config, run_inputs: RunInputs, world_size: int, *, thorough: bool = False
) -> list[Finding]:
    """Compare free disk with what the run will write, and some of the data with its checksums.

    Some of it: blocks of every corpus and shards of every score store.
    """
    job = Job(config, run_inputs.vocabulary_size, NO_GPU, 1, world_size)
    return [*_disks(config, run_inputs, job), *_data(run_inputs, SAMPLED_SHARDS if thorough else 1)]


def files_of(run_inputs: RunInputs) -> list[str]:
    """Every large file that all nodes read."""
    paths = []
    for corpus in [*run_inputs.corpora, *run_inputs.validation.values()]:
        paths += [f"{corpus.prefix}.bin", f"{corpus.prefix}.idx"]
        if corpus.scores is not None:
            paths += [str(corpus.scores.column_path(name)) for name in corpus.scores.columns]
    return paths


def size_of(path: str | Path) -> int:
    """Bytes of a file, -1 where there is none that can be read."""
    try:
        return os.stat(path).st_size
    except OSError:
        return -1


def index_bytes(config: Config, corpora: list[Corpus]) -> int:
    """Size of the sample indices of the run's training corpora, at most.

    The indices list the documents and samples of every epoch, and the samples of a blend.
    """
    samples = train_steps(config) * config.data.global_batch_size
    tokens = sum(corpus.manifest.tokens for corpus in corpora)
    weights = config.data.weights or [corpus.manifest.tokens for corpus in corpora]
    total = samples * 10 if len(corpora) > 1 else 0
    for weight, corpus in zip(weights, corpora, strict=True):
        per_epoch = max(1, corpus.manifest.tokens // config.data.sequence_length)
        epochs = -(-samples * weight // (sum(weights) * per_epoch)) if tokens else 0
        total += int(epochs) * (4 * corpus.manifest.documents + 24 * per_epoch)
    return total


def _disks(config: Config, run_inputs: RunInputs, job: Job) -> list[Finding]:
    """The run's needs by file system: checkpoints and indices may lie on one or on two."""
    if not planned_length(config).remaining_steps:
        return [Finding("disk", FINE, "the run has done its last step: nothing is to be written")]
    one_bytes = checkpoint_bytes(job)
    folder = Path(config.run.folder)
    all_bytes = one_bytes * checkpoints_on_disk(config, job.steps)
    left_bytes = max(0, all_bytes - _bytes_in(folder / "checkpoints"))
    index_left_bytes = _left_of_index(config, run_inputs)
    needs = [
        DiskNeed("one checkpoint takes", folder, left_bytes, one_bytes),
        DiskNeed(
            "the sample indices take", index_cache(config), index_left_bytes, index_left_bytes
        ),
    ]
    by_disk: dict[int, list[DiskNeed]] = defaultdict(list)
    for need in needs:
        existing = _nearest_existing(need.folder)
        by_disk[existing.stat().st_dev].append(replace(need, folder=existing))
    return [disk_finding(needs_of_disk) for needs_of_disk in by_disk.values()]


@dataclass(frozen=True)
class DiskNeed:
    """What a run writes to one folder."""

    what: str
    """What `least_bytes` are for, with its verb: "one checkpoint takes"."""
    folder: Path
    whole_bytes: int
    """Bytes of the whole run."""
    least_bytes: int
    """Without this much free space the run is useless."""


def disk_finding(needs: list[DiskNeed], free_bytes: int | None = None) -> Finding:
    """The finding about one file system and what is written to it."""
    folder = needs[0].folder
    if free_bytes is None:
        status = os.statvfs(folder)
        free_bytes = status.f_bavail * status.f_frsize
    whole_bytes = sum(need.whole_bytes for need in needs)
    least_bytes = sum(need.least_bytes for need in needs)
    sizes = (
        f"{folder}: {describe_size(free_bytes)} free, at most {describe_size(whole_bytes)} to be "
        "written (plan)"
    )
    advice = (
        "Free space, give another run.folder or data.index_cache, or keep fewer checkpoints "
        "(checkpoint.keep_last)"
    )
    if free_bytes < min(least_bytes, whole_bytes):
        parts = [
            f"{need.what} {describe_size(need.least_bytes)}" for need in needs if need.least_bytes
        ]
        return Finding("disk", BAD_SETTINGS, f"{sizes}; {', '.join(parts)}. {advice}")
    if free_bytes < whole_bytes:
        return Finding("disk", WARNING, f"{sizes}: it may fill up. {advice}")
    return Finding("disk", FINE, sizes)


def _left_of_index(config: Config, run_inputs: RunInputs) -> int:
    return max(0, index_bytes(config, run_inputs.corpora) - _bytes_in(index_cache(config)))


def _data(run_inputs: RunInputs, shards_sampled: int) -> list[Finding]:
    corpora = [*run_inputs.corpora, *run_inputs.validation.values()]
    findings = []
    blocks = 0
    for corpus in corpora:
        try:
            blocks += check_sample(corpus.prefix, BLOCKS_PER_SHARD * shards_sampled)
        except (ValueError, OSError) as error:
            findings.append(Finding("corpora", BAD_DATA, str(error)))
        if corpus.scores is None:
            continue
        shards = corpus.scores.manifest.shard_count
        finished = sorted(set(range(shards)) - corpus.scores.missing)
        sample = random.SystemRandom().sample(finished, min(shards_sampled, len(finished)))
        try:
            corpus.scores.verify(shards=sample)
        except ValueError as error:
            findings.append(Finding("score store", BAD_DATA, str(error)))
        else:
            checked = (
                f"{corpus.scores.folder}: size, and the checksums of {len(sample)} of {shards} "
                "shards"
            )
            findings.append(Finding("score store", FINE, checked))
    tokens = sum(corpus.manifest.tokens for corpus in corpora)
    if not any(finding.check == "corpora" for finding in findings):
        checked = (
            f"{len(corpora)} with {tokens:,} tokens: sizes, indices, and {blocks} blocks read again"
        )
        findings.insert(0, Finding("corpora", FINE, checked))
    return findings


def _bytes_in(folder: Path) -> int:
    return sum(
        max(0, size_of(Path(path, name))) for path, _, names in os.walk(folder) for name in names
    )


def _nearest_existing(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path
