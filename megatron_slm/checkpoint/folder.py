"""What a checkpoint looks like on disk, and which one is the newest good one. No torch.

<run>/checkpoints/step_00000100/    one checkpoint: megatron-core's torch_dist files, and
    model.json                      what the weights are (sizes, tokenizer, step)
    trainer.json                    where training was (data position, schedule, W&B run)
    checksums.json                  sha256 of every other file
<run>/checkpoints/.writing_step_... one being written; a rename makes it a checkpoint
<run>/checkpoints/step_...damaged   one whose files were found damaged; never read again
<run>/checkpoints/latest            name of the newest, for people and scripts; the program itself
                                    looks at the folders
<run>/checkpoints/best              name of the one with the lowest validation loss, where retention
                                    asks for it
"""

import hashlib
import os
import re
import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

from megatron_slm.config.schema import ModelConfig
from megatron_slm.files.atomic import sync_path, write_json
from megatron_slm.files.hashing import file_sha256
from megatron_slm.files.plain import (
    LeadsOutside,
    is_plain_name,
    plain_file,
    read_json_object,
    shown,
)

_NAME = re.compile(r"step_(\d{8,})$")
FORMATS = {
    "sharded_backend": "torch_dist",
    "sharded_backend_version": 1,
    "common_backend": "torch",
    "common_backend_version": 1,
}
"""metadata.json of every checkpoint that is written here: megatron-core's names of its formats."""


@dataclass(frozen=True)
class CheckpointInfo:
    """model.json: everything needed to rebuild the model around the weights."""

    model: dict
    """Fields of ModelConfig, with the true vocabulary_size."""
    sequence_length: int
    tokenizer: dict
    """path, fingerprint, vocabulary_size, and what else the corpora's manifests say of it.

    prepend_bos: whether their documents begin with the begin token; None, or absent in an older
    checkpoint, when they differ or it is not known."""
    step: int
    tokens_processed: int
    precision: str = "fp32"
    fingerprint: str = ""
    """"sha256:..." of the weights' files; empty until the checkpoint is complete."""
    validation_loss: dict[str, float] = field(default_factory=dict)
    """Plain loss in nats of each validation corpus at this very step; empty where it was not
    measured.
    """
    extra: dict = field(default_factory=dict)

    def model_config(self) -> ModelConfig:
        """The trained model. ValueError if this version cannot build the model in model.json."""
        from megatron_slm.config.load import from_mapping

        config, problems = from_mapping({"model": self.model})
        if problems:
            raise ValueError(
                "model.json describes a model that this version cannot build: "
                f"{'; '.join(problems)}. Use the version that wrote it, or another checkpoint"
            )
        return config.model

    def reference_model(self) -> ModelConfig:
        """The model as a frozen reference: without dropout and recomputation."""
        return replace(self.model_config(), dropout=0.0, recompute="none")


def describe_model(model: ModelConfig, vocabulary_size: int) -> dict:
    """The entry of model.json for a model: its settings, with the true vocabulary size.

    Where they were taken from is left out: the checkpoint stands alone.
    """
    described = {**asdict(model), "vocabulary_size": vocabulary_size}
    del described["from_checkpoint"]
    return described


def step_folder(checkpoints: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` optimizer steps."""
    return checkpoints / f"step_{step:08d}"


def writing_folder(checkpoints: Path, step: int) -> Path:
    """Where that checkpoint is written before it is complete."""
    return checkpoints / f".writing_step_{step:08d}"


def complete_checkpoints(checkpoints: Path) -> list[Path]:
    """Checkpoint folders that were completely written, oldest first.

    A folder gets its step_* name by a rename, once it is complete.
    """
    if not checkpoints.is_dir():
        return []
    complete = [path for path in checkpoints.iterdir() if _NAME.match(path.name) and path.is_dir()]
    return sorted(complete, key=lambda path: (step_of(path), path))


def tidy(checkpoints: Path) -> None:
    """Clean up after kills: remove unfinished saves; if a checkpoint was being replaced and the new
    one is not in place, restore the old one's name.
    """
    if not checkpoints.is_dir():
        return
    for replaced in checkpoints.glob(".replaced_step_*"):
        final = checkpoints / replaced.name.removeprefix(".replaced_")
        if not final.exists():
            replaced.rename(final)
    for pattern in (".writing_step_*", ".replaced_step_*", ".removing_step_*"):
        for unfinished in checkpoints.glob(pattern):
            shutil.rmtree(unfinished, ignore_errors=True)


def settle_on(good: Path, damaged: list[Path]) -> None:
    """Make `good` the newest checkpoint: rename the damaged newer ones, so that they are not read,
    and point `latest` at `good`.
    """
    for path in damaged:
        renamed = path.with_name(f"{path.name}.damaged")
        shutil.rmtree(renamed, ignore_errors=True)
        path.rename(renamed)
    point_to(good)


def point_to(checkpoint: Path, name: str = "latest") -> None:
    """Make the pointer `name` name this checkpoint.

    The pointer is written under a temporary name, synced and renamed, so it always names a complete
    checkpoint.
    """
    temporary = checkpoint.with_name(f".{name}.new")
    with open(temporary, "w") as file:
        file.write(checkpoint.name + "\n")
        file.flush()
        os.fsync(file.fileno())
    temporary.replace(checkpoint.with_name(name))
    sync_path(checkpoint.parent)


def step_of(folder: Path) -> int:
    """The step in a checkpoint folder's name."""
    match = _NAME.match(folder.name)
    assert match is not None, folder
    return int(match[1])


def resolve_checkpoint(path: str | Path) -> Path:
    """The checkpoint that `path` refers to: a step folder, a pointer (latest, best), or the newest
    one of a checkpoints folder or a run folder.

    Raises ValueError when there is none.
    """
    path = Path(path)
    if path.name in ("latest", "best") and path.is_file():
        path = path.with_name(path.read_text().strip())
    if (path / "model.json").is_file():
        return path
    for folder in (path / "checkpoints", path):
        if complete := complete_checkpoints(folder):
            return complete[-1]
    if not path.exists():
        raise ValueError(
            f"{path}: no such checkpoint; give a run folder, its checkpoints folder, or one step_* "
            "folder"
        )
    raise ValueError(
        f"{path}: holds no complete checkpoint (no step_*/model.json); give a run folder whose "
        "training saved one"
    )


def read_checkpoint_info(path: str | Path) -> CheckpointInfo:
    """model.json of the checkpoint that `path` refers to; its fingerprint comes from
    checksums.json.

    ValueError when one of the two is unreadable, or model.json is not what checksums.json says;
    LeadsOutside when checksums.json names what does not lie in the folder.
    """
    folder = resolve_checkpoint(path)
    try:
        stored = read_json_object(folder, "model.json")
        checksums = read_checksums(folder)
        info = CheckpointInfo(**{**stored, "fingerprint": _fingerprint(checksums)})
    except LeadsOutside:
        raise
    # A flipped byte may be no JSON, no UTF-8, or another key (TypeError).
    except (ValueError, TypeError) as error:
        raise ValueError(
            f"{folder}: damaged checkpoint, {error}; use an older step_* folder"
        ) from error
    if checksums.get("model.json", "") not in ("", file_sha256(folder / "model.json")):
        raise ValueError(
            f"{folder}: model.json differs from its checksum in checksums.json; use an older "
            "step_* folder, or copy it again"
        )
    return info


def _fingerprint(checksums: dict[str, str]) -> str:
    weights = sorted(
        f"{name}:{digest}" for name, digest in checksums.items() if name.endswith(".distcp")
    )
    return "sha256:" + hashlib.sha256("\n".join(weights).encode()).hexdigest()


def _write(path: Path, content: dict) -> None:
    write_json(path, content, indent=1, sort_keys=True, ensure_ascii=True)


def complete(
    checkpoints: Path, step: int, info: CheckpointInfo, trainer: dict, checksums: dict[str, str]
) -> Path:
    """Turn a written folder into a checkpoint: write descriptions and checksums, sync, rename, then
    set the pointer `latest`.
    """
    writing = writing_folder(checkpoints, step)
    final = step_folder(checkpoints, step)
    described = asdict(info)
    described.pop("fingerprint")
    _write(writing / "model.json", described)
    _write(writing / "trainer.json", trainer)
    for name in ("model.json", "trainer.json"):
        checksums[name] = file_sha256(writing / name)
    _write(writing / "checksums.json", checksums)
    sync_path(writing)
    if final.exists():
        # A resumed run has reached the same step again: the complete one stays until it is
        # replaced.
        trash = checkpoints / f".replaced_{final.name}"
        shutil.rmtree(trash, ignore_errors=True)
        final.rename(trash)
        writing.rename(final)
        shutil.rmtree(trash, ignore_errors=True)
    else:
        writing.rename(final)
    sync_path(checkpoints)  # the rename is on disk before the pointer can name it
    point_to(final)
    return final


def read_checksums(folder: Path) -> dict[str, str]:
    """checksums.json: sha256 by file name.

    ValueError when it cannot be read, LeadsOutside when it names what is not in the folder.
    """
    checksums = read_json_object(folder, "checksums.json")
    for name, digest in checksums.items():
        if not is_plain_name(name):
            raise LeadsOutside(
                f"{folder / 'checksums.json'} names {shown(repr(name))}: only files in the "
                "checkpoint's own folder are read, so this checkpoint is refused"
            )
        if not isinstance(digest, str):
            raise ValueError(
                f"{folder / 'checksums.json'}: the checksum of {shown(name)} is "
                f"{shown(repr(digest))}"
            )
    return checksums


def damaged_files(folder: Path, rank_slice: tuple[int, int] = (0, 1)) -> list[str]:
    """Names of files that are missing, no plain files, or not what checksums.json says.

    `rank_slice` = (rank, size) checks every size-th file. LeadsOutside, on every rank, when
    checksums.json names what does not lie in the folder.
    """
    rank, ranks = rank_slice
    try:
        checksums = read_checksums(folder)
    except LeadsOutside:
        raise
    except ValueError:
        return ["checksums.json"]
    return [
        name
        for name in sorted(checksums)[rank::ranks]
        if not _is_whole(folder, name, checksums[name])
    ]


def _is_whole(folder: Path, name: str, digest: str) -> bool:
    try:
        return file_sha256(plain_file(folder, name)) == digest
    except (OSError, ValueError):  # missing, no plain file, or the disk cannot read it
        return False
