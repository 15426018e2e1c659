"""The output of a stage, and how far it has come, determined from its files and never from the
queue.
"""

from dataclasses import dataclass
from pathlib import Path

from megatron_slm.checkpoint.folder import complete_checkpoints, step_of
from megatron_slm.data.manifest import manifest_path
from megatron_slm.data.score_manifest import ScoreManifest, finished_shards
from megatron_slm.monitoring.run_status import read_status


@dataclass(frozen=True)
class Standing:
    """Whether an output is complete, and a description of its progress (may be empty)."""

    complete: bool
    progress: str = ""


@dataclass(frozen=True)
class Manifests:
    """Files that are written last and at once: what they describe is whole when they exist."""

    paths: tuple[Path, ...]

    def standing(self) -> Standing:
        return Standing(all(path.exists() for path in self.paths))


@dataclass(frozen=True)
class Files:
    """Files that do not show whether they are complete, or none: the exit code counts as well."""

    paths: tuple[Path, ...]

    def standing(self) -> Standing:
        return Standing(all(path.exists() for path in self.paths))


@dataclass(frozen=True)
class CorpusParts:
    """The parts of a corpus that array jobs make. Once they are joined, they may go."""

    prefix: Path
    jobs: int

    def standing(self) -> Standing:
        if manifest_path(self.prefix).exists():
            return Standing(True)
        finished = sum(
            manifest_path(f"{self.prefix}.shard-{part:05d}-of-{self.jobs:05d}").exists()
            for part in range(self.jobs)
        )
        return Standing(finished == self.jobs, f"{finished} of {self.jobs} parts")


@dataclass(frozen=True)
class Checkpoints:
    """A run folder: complete with the checkpoint of the last step."""

    run_folder: Path
    steps: int

    def standing(self) -> Standing:
        found = complete_checkpoints(self.run_folder / "checkpoints")
        saved = step_of(found[-1]) if found else 0
        if found and saved >= self.steps:
            return Standing(True, f"{saved:,} steps")
        status = read_status(self.run_folder)
        if status is None:
            return Standing(False, f"step {saved:,} of {self.steps:,} saved" if found else "")
        reason = f": {status.reason}" if status.reason else ""
        state = "ended without a word" if status.was_killed else status.state
        return Standing(
            False,
            f"{state} at step {status.step:,} of {self.steps:,}{reason}; step {saved:,} is saved",
        )


@dataclass(frozen=True)
class Scores:
    """A score store: complete when its manifest says so."""

    folder: Path

    def standing(self) -> Standing:
        if not (self.folder / "manifest.json").exists():
            return Standing(False)
        try:
            manifest = ScoreManifest.from_json(self.folder / "manifest.json")
            if manifest.complete:
                return Standing(True, f"{manifest.corpus_tokens:,} tokens")
            shards = len(finished_shards(self.folder))
        except ValueError as error:
            return Standing(False, str(error))
        return Standing(False, f"{shards} of {manifest.shard_count} shards")


Output = Manifests | Files | CorpusParts | Checkpoints | Scores
