"""--local with programs of a line each: order, exit codes, a request to stop, what is kept."""

import os
import signal
import sys
import threading

import pytest

from megatron_slm.pipeline.checks import Assembled
from megatron_slm.pipeline.description import Pipeline
from megatron_slm.pipeline.local import LocalRun
from megatron_slm.pipeline.outputs import Files
from megatron_slm.pipeline.stages import PROGRAM, Stage
from megatron_slm.pipeline.state import State


def stage(folder, name: str, code: str, after: tuple[str, ...] = ()) -> Stage:
    words = ("python", "-c", code, str(folder / name))
    output = Files((folder / name,))
    return Stage(name, PROGRAM, name, words, after, output, {"code": code}, makes=(name,))


WRITE = "import sys; open(sys.argv[1], 'w')"


def run(folder, *stages: Stage) -> int:
    pipeline = Assembled(Pipeline(folder=str(folder)), list(stages), {})
    state = State(pipeline)
    state.write(pipeline)
    return LocalRun(pipeline, state, folder).run()


@pytest.fixture(autouse=True)
def this_python(monkeypatch):
    monkeypatch.setenv("SLM_PYTHON", sys.executable)


def test_a_failure_ends_the_run_with_its_code_and_the_next_call_goes_on(tmp_path, capfd):
    first, last = stage(tmp_path, "first", WRITE), stage(tmp_path, "last", WRITE, ("middle",))
    failing = stage(tmp_path, "middle", "raise SystemExit(3)", ("first",))
    assert run(tmp_path, first, failing, last) == 3
    assert "middle ended with exit code 3; the same command continues" in capfd.readouterr().err
    assert not (tmp_path / "last").exists()
    assert run(tmp_path, first, stage(tmp_path, "middle", WRITE, ("first",)), last) == 0
    assert "done before: first" in capfd.readouterr().out


def test_a_program_that_leaves_nothing_is_no_success(tmp_path, capfd):
    assert run(tmp_path, stage(tmp_path, "first", "pass")) == 3
    assert "what it should have left is not complete" in capfd.readouterr().err


def test_a_changed_stage_is_made_again_and_the_old_output_kept(tmp_path, capfd):
    assert run(tmp_path, stage(tmp_path, "first", WRITE)) == 0
    changed = "import sys; open(sys.argv[1], 'w').write('new')"
    assert run(tmp_path, stage(tmp_path, "first", changed)) == 0
    assert (tmp_path / "first").read_text() == "new"
    assert (tmp_path / "earlier_1" / "first").read_text() == ""
    assert "its inputs or options have changed" in capfd.readouterr().out


def test_asked_to_stop_it_asks_the_stage_and_starts_no_other(tmp_path, capfd):
    waiting = "import sys, time; open(sys.argv[1], 'w'); time.sleep(60)"
    stages = stage(tmp_path, "first", waiting), stage(tmp_path, "last", WRITE, ("first",))

    def ask() -> None:
        while not (tmp_path / "first").exists():
            threading.Event().wait(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.getsignal(signal.SIGTERM)
    asking = threading.Thread(target=ask)
    asking.start()
    assert run(tmp_path, *stages) == 85
    asking.join()
    assert not (tmp_path / "last").exists()
    assert signal.getsignal(signal.SIGTERM) is before
    assert "stopping" in capfd.readouterr().err
