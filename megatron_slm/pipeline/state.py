"""The records in a pipeline's folder of what each stage's output was made from.

Finished outputs with unchanged inputs are kept.

FOLDER/pipeline/description.yaml    the description, complete
FOLDER/pipeline/configs/            the complete settings of every training and scoring
FOLDER/pipeline/stages/NAME         the key of what is, or is being, made there
FOLDER/pipeline/stages/NAME.done    the key of a program that has finished
FOLDER/earlier_1, earlier_2, ...    what earlier descriptions had made
"""

import glob
import hashlib
import json
from pathlib import Path

from megatron_slm.config.load import to_yaml
from megatron_slm.files.atomic import write_text_atomically
from megatron_slm.files.hashing import file_sha256
from megatron_slm.pipeline.checks import Assembled
from megatron_slm.pipeline.outputs import Files, Standing
from megatron_slm.pipeline.stages import Stage

HASHED_BYTES_AT_MOST = 1 << 30
"""Files that are larger together count by name, size and time of change, not by content."""


class State:
    """The memory of one pipeline's folder."""

    def __init__(self, pipeline: Assembled):
        self.folder = pipeline.folder
        self._stages = {stage.name: stage for stage in pipeline.stages}
        self.keys = self._keys(pipeline.stages)
        self._earlier: Path | None = None

    def _keys(self, stages: list[Stage]) -> dict[str, str]:
        """Stage -> fingerprint of everything that decides its output."""
        keys: dict[str, str] = {}
        for stage in stages:
            before = sorted({keys[name] for name in stage.after})
            if stage.made_from is None:
                [keys[stage.name]] = before
                continue
            text = json.dumps([stage.made_from, before, _contents(stage.reads)], sort_keys=True)
            text = text.replace(json.dumps(str(self.folder))[1:-1], "FOLDER")
            keys[stage.name] = hashlib.sha256(text.encode()).hexdigest()
        return keys

    def standing(self, stage: Stage) -> Standing:
        """How far the output of the present description has come."""
        standing = stage.output.standing()
        if not self.is_current(stage):
            exists = bool(self.outputs(stage))
            return Standing(False, "made from something else" if exists else "")
        if isinstance(stage.output, Files) and _read(self.mark(stage)) != self.keys[stage.name]:
            return Standing(False, standing.progress)
        return standing

    def is_current(self, stage: Stage) -> bool:
        """Whether the existing output, complete or not, was made from the present description."""
        return _read(self._record(stage)) == self.keys[stage.name]

    def outputs(self, stage: Stage) -> list[Path]:
        """The existing files of a stage's output, whatever made them."""
        return [
            Path(path)
            for pattern in stage.makes
            for path in sorted(glob.glob(f"{glob.escape(str(self.folder))}/{pattern}"))
        ]

    def mark(self, stage: Stage) -> Path:
        """The file that says a program has finished: its key."""
        return self._record(stage).with_name(f"{stage.name}.done")

    def begin(self, stage: Stage) -> str:
        """Note what the stage is made from, before it starts; move away what was made from
        something else.

        Returns a sentence where something was moved.
        """
        outputs = self.outputs(stage)
        moved = ""
        if outputs and not self.is_current(stage):
            earlier = self._earlier_folder()
            for path in outputs:
                path.rename(earlier / path.name)
            known = self._record(stage).exists()
            reason = (
                "its inputs or options have changed, so it is made again"
                if known
                else "nothing says what it was made from, so it is made again"
            )
            moved = f"{stage.name}: {reason}; what was there is in {earlier}"
        if not self.is_current(stage):
            self.mark(stage).unlink(missing_ok=True)
            write_text_atomically(self._record(stage), self.keys[stage.name] + "\n")
        return moved

    def finish(self, stage: Stage) -> None:
        """Note that a program has finished."""
        if isinstance(stage.output, Files):
            write_text_atomically(self.mark(stage), self.keys[stage.name] + "\n")

    def write(self, pipeline: Assembled) -> None:
        """The description and the settings of every run, as the jobs will read them."""
        own = self.folder / "pipeline"
        for name in ("configs", "stages", "logs"):
            (own / name).mkdir(parents=True, exist_ok=True)
        write_text_atomically(own / "description.yaml", to_yaml(pipeline.description))
        for name, text in pipeline.configs.items():
            write_text_atomically(own / "configs" / f"{name}.yaml", text)

    def _record(self, stage: Stage) -> Path:
        return self.folder / "pipeline" / "stages" / stage.name

    def _earlier_folder(self) -> Path:
        if self._earlier is None:
            number = 1
            while (self.folder / f"earlier_{number}").exists():
                number += 1
            self._earlier = self.folder / f"earlier_{number}"
            self._earlier.mkdir()
        return self._earlier


def _read(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _contents(reads: tuple[str, ...]) -> list[str]:
    """One line per file that the words name: its content's sha256.

    Its name, size and time instead where there is much to read.
    """
    files = [path for word in reads for path in _files(word)]
    sizes = [path.stat().st_size for path in files]
    if sum(sizes) > HASHED_BYTES_AT_MOST:
        return [
            f"{path} {size} {path.stat().st_mtime_ns}"
            for path, size in zip(files, sizes, strict=True)
        ]
    return [file_sha256(path) for path in files]


def _files(word: str) -> list[Path]:
    path = Path(word)
    if path.is_dir():
        return sorted(each for each in path.rglob("*") if each.is_file())
    if path.exists():
        return [path]
    return [Path(match) for match in sorted(glob.glob(word)) if Path(match).is_file()]
