"""python -m megatron_slm.train with a bad configuration: every problem, exit code 2, and nothing
started.
"""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_slm.files.folder_lock import FolderLock
from megatron_slm.train import main

ROOT = Path(__file__).resolve().parents[3]
FORBIDDEN = """
import sys
class Guard:
    def find_spec(self, name, path=None, target=None):
        early = name.split('.')[0] in ('torch', 'megatron')
        assert not early, f'{name} is imported before the configuration is checked'
sys.meta_path.insert(0, Guard())
from megatron_slm.train import main
sys.exit(main(sys.argv[1:]))
"""


def train(*argv, code=None, **environment) -> subprocess.CompletedProcess:
    start = ["-c", code] if code else ["-m", "megatron_slm.train"]
    return subprocess.run(
        [sys.executable, *start, *argv],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_every_unreadable_setting_is_named():
    done = train("--model.layers", "many", "--model.banana", "1", "--config", "nowhere.yaml")
    assert done.returncode == 2, done.stderr
    for part in ("3 problems", "model.layers", "model.banana", "nowhere.yaml"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_broken_rules_are_found_before_torch_is_even_imported():
    """So no process group, no CUDA context and no second of waiting precede the message."""
    done = train(
        "--model.attention_heads",
        "3",
        "--schedule.train_steps",
        "5",
        "--optimizer.beta1",
        "2",
        code=FORBIDDEN,
    )
    assert done.returncode == 2, done.stderr
    for part in ("model.hidden_size", "data.train", "data.tokenizer", "optimizer.beta1"):
        assert part in done.stderr
    assert "Traceback" not in done.stderr


def test_the_layout_is_checked_against_the_size_of_the_job(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "0")
    assert main(["--parallel.tensor", "2"]) == 2
    assert "3 processes are not a multiple" in capsys.readouterr().err


def test_only_the_first_process_speaks(monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "3")
    monkeypatch.setenv("RANK", "1")
    assert main(["--parallel.tensor", "2"]) == 2
    assert capsys.readouterr().err == ""


def settings_that_pass(folder) -> list[str]:
    """Settings in which nothing is wrong that can be seen without opening a file."""
    names = ["--data.train", f"[{folder}/corpus]", "--data.tokenizer", f"{folder}/vocabulary.model"]
    return ["--run.folder", f"{folder}/run", "--schedule.train_steps", "5", *names]


def test_a_run_folder_has_one_run_at_a_time(tmp_path, capsys):
    with FolderLock(tmp_path / "run", "a training run", ""):
        assert main(settings_that_pass(tmp_path)) == 2
        said = capsys.readouterr().err
        assert f"process {os.getpid()} on {socket.gethostname()}, since " in said
        assert f"touch {tmp_path}/run/stop_requested" in said
        assert [path.name for path in (tmp_path / "run").iterdir()] == ["lock"]


def test_a_run_folder_that_cannot_be_made(tmp_path, capsys):
    (tmp_path / "run").write_text("a file")
    assert main(settings_that_pass(tmp_path)) == 2
    assert f"run.folder {tmp_path}/run: cannot be written" in capsys.readouterr().err


@pytest.mark.parametrize("argv, code", [(["--help"], 0), (["--print_config"], 0)])
def test_asking_is_not_an_error(argv, code, capsys):
    with pytest.raises(SystemExit) as stopped:
        main(argv)
    assert stopped.value.code == code
    assert "model" in capsys.readouterr().out
