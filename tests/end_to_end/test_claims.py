"""The experiments of benchmarks/claims at the scale `smoke`, with the real programs."""

import signal
from pathlib import Path

import pytest

from benchmarks.claims import run
from benchmarks.claims.analysis import Results, found_noise
from benchmarks.claims.experiment import experiment_names
from benchmarks.claims.page import section
from benchmarks.claims.runner import ForkLauncher

AFTER_STEP = """
import os
import signal


def die(step, metrics):
    os.kill(os.getpid(), signal.SIGKILL)
"""


class KilledOnce(ForkLauncher):
    """The first run whose settings file has a word in its name kills itself after a step."""

    def __init__(self, word: str, folder: Path):
        super().__init__()
        self.word = word
        self.file = folder / "after_step.py"
        self.file.write_text(AFTER_STEP)

    def __call__(self, command, log):
        if self.word and self.word in command[-1]:
            self.word = ""
            command = [*command, "--monitoring.after_step", f"{self.file}:die"]
        return super().__call__(command, log)


def test_an_experiment_continues_after_a_kill(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    folder = tmp_path / "runs"
    words = ["main", "--scale", "smoke", "--folder", str(folder), "--seeds", "1", "--pairs", "code"]
    words += ["--arms", "plain", "slm"]
    assert run.main(words, KilledOnce("train-slm", tmp_path)) == 1
    assert "ended with -9" in capsys.readouterr().err
    done = {path.name: path.stat().st_mtime_ns for path in folder.glob("done/*")}
    assert len(done) == 9

    assert run.main(words, ForkLauncher()) == 2
    assert "continue there with --resume" in capsys.readouterr().err
    figures = tmp_path / "figures"
    assert run.main([*words, "--resume", "--figures", str(figures)], ForkLauncher()) == 0
    again = {path.name: path.stat().st_mtime_ns for path in folder.glob("done/*")}
    assert done.items() < again.items()
    assert len(again) == 10

    results = Results.read("main", folder)
    [_, found] = results.comparisons("code")
    assert found.arm.kept_fraction == pytest.approx(0.6, abs=0.01)
    assert found.arm.flops["reference"] > 0
    assert (figures / "claims_main.svg").stat().st_size > 1000
    assert (figures / "claims_main_code.svg").stat().st_size > 1000
    assert "(one seed) | too few seeds | – | – |" in section(results)


@pytest.mark.slow
@pytest.mark.parametrize("name", experiment_names())
def test_every_experiment_runs(name, tmp_path, monkeypatch):
    monkeypatch.setattr(signal, "signal", lambda *_: None)
    words = [name, "--scale", "smoke", "--folder", str(tmp_path), "--seeds", "2"]
    figures = tmp_path / "figures"
    assert run.main([*words, "--jobs", "2", "--figures", str(figures)], ForkLauncher()) == 0
    assert (figures / f"claims_{name}.svg").is_file()
    results = Results.read(name, tmp_path)
    for pair in results.declared["pairs"]:
        assert results.not_run(pair) == []
        counts = {each.difference.count for each in results.comparisons(pair) if each.difference}
        assert counts == {2}
        if results.declared["planted"]:
            found = found_noise(results, pair, results.arms(pair)["slm"])
            assert found.recall.mean == pytest.approx(0.4, abs=0.2)
            assert "Planted words, SLM 0.6" in section(results)
    assert section(results)
