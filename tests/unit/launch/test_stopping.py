"""Real bash and real torchrun around stand-ins for the trainer: requests to stop arrive, exit codes
come back, nothing is orphaned.
"""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]
# A trainer without torch: it listens as the real one does, works until it is asked, and says so in
# a file of its rank.
TRAINER = """
import os, pathlib, sys, time
from stop_signals import StopSignals

if "--check_only" in sys.argv:
    print("unused")
    sys.exit()
here = pathlib.Path(os.environ["SCRATCH"])
with StopSignals("stopping") as signals:
    temporary = here / f"temporary_{os.environ['RANK']}"
    temporary.write_text(f"{os.getpid()} {os.getppid()}")
    temporary.rename(here / f"started_{os.environ['RANK']}")
    while not signals.asked or os.environ.get("DEAF"):
        time.sleep(0.02)
    (here / f"saved_{os.environ['RANK']}").write_text(signals.asked)
    sys.exit(85)
"""


class Checkout:
    """A checkout with the launcher's own files and a trainer of two processes that runs until it is
    asked to stop.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        shutil.copytree(ROOT / "launch", folder / "launch")
        package = folder / "megatron_slm"
        package.mkdir()
        (package / "__init__.py").touch()
        (package / "train.py").write_text(TRAINER + '\nif __name__ == "__main__":\n    pass\n')
        shutil.copy(ROOT / "megatron_slm" / "training" / "stop_signals.py", folder)
        self.process = None

    def start(self, **environment: str) -> subprocess.Popen:
        self.process = subprocess.Popen(
            ["bash", self.folder / "launch" / "local.sh", "2", "train"],
            env={
                **os.environ,
                "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
                "SLM_VENV": "/nonexistent",
                "SCRATCH": str(self.folder),
                "PYTHONPATH": str(self.folder),
                **environment,
            },
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=self.folder,
            preexec_fn=_take_signals,
        )
        self.wait_for(
            lambda: self.process.poll() is not None
            or all(path.exists() for path in self.files("started"))
        )
        assert self.process.poll() is None, self.process.communicate()[0]
        return self.process

    def files(self, name: str) -> list[Path]:
        return [self.folder / f"{name}_{rank}" for rank in range(2)]

    def processes(self) -> tuple[list[int], int]:
        """The trainers, and the torchrun above them."""
        pairs = [path.read_text().split() for path in self.files("started")]
        return [int(trainer) for trainer, _ in pairs], int(pairs[0][1])

    def wait_for(self, condition) -> None:
        deadline = time.monotonic() + 90
        while not condition():
            assert time.monotonic() < deadline, "it did not happen"
            time.sleep(0.05)

    def wait_for_the_end_of(self, pids: list[int]) -> None:
        self.wait_for(lambda: not any(Path(f"/proc/{pid}").exists() for pid in pids))

    def asked(self) -> list[str]:
        return [path.read_text() for path in self.files("saved") if path.exists()]

    def clean(self) -> None:
        pids = [self.process.pid]
        if all(path.exists() for path in self.files("started")):
            trainers, torchrun = self.processes()
            pids += [torchrun, *trainers]
        for pid in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)


def _take_signals() -> None:
    """A test run in the background of a shell, or under nohup, ignores some, and bash cannot trap
    what was ignored.
    """
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
        signal.signal(number, signal.SIG_DFL)


@pytest.fixture
def checkout(tmp_path):
    made = Checkout(tmp_path)
    yield made
    made.clean()


def test_a_request_reaches_every_worker_and_the_exit_code_comes_back(checkout):
    process = checkout.start()
    process.send_signal(signal.SIGHUP)
    output, _ = process.communicate(timeout=90)
    assert (process.returncode, checkout.asked()) == (85, ["SIGTERM", "SIGTERM"]), output
    assert "start the same command again to continue" in output
    # torchrun's own report calls a worker that stopped on request a failure
    assert "failed" not in output
    assert "closing signal" not in output
    assert "Traceback" not in output


def test_a_second_request_ends_everything_at_once(checkout):
    process = checkout.start(DEAF="yes")
    trainers, torchrun = checkout.processes()
    process.send_signal(signal.SIGINT)
    time.sleep(0.7)  # closer together they are one request
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=90)
    assert process.returncode == 130, output
    checkout.wait_for_the_end_of([torchrun, *trainers])
    assert checkout.asked() == []


@pytest.mark.parametrize("killed", ["local.sh", "torchrun"])
def test_trainers_whose_launcher_was_killed_stop_by_themselves(checkout, killed):
    process = checkout.start()
    trainers, torchrun = checkout.processes()
    os.kill(process.pid if killed == "local.sh" else torchrun, signal.SIGKILL)
    checkout.wait_for_the_end_of(trainers)
    assert checkout.asked() == ["SIGTERM", "SIGTERM"]
    process.communicate(timeout=90)  # nobody holds its output any more


def test_processes_passes_on_the_workers_exit_code_and_leaves_no_temporary_folder(tmp_path):
    """With the real torchrun: itself it would end with 1 whatever the workers said."""
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    worker = tmp_path / "worker.py"
    worker.write_text("import sys\nsys.exit(3)\n")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "launch" / "processes.py",
            "--standalone",
            "--nproc-per-node=2",
            str(worker),
        ],
        env={**os.environ, "OMP_NUM_THREADS": "1", "TMPDIR": str(temporary)},
        capture_output=True,
        text=True,
    )
    assert list(temporary.iterdir()) == []
    assert done.returncode == 3, done.stderr
    assert "exit code 3: process" in done.stderr
    assert "Traceback" not in done.stderr
    assert "exitcode" not in done.stderr  # torchrun's words for what the worker has said itself


def test_a_task_of_slurm_is_one_process_of_the_job(tmp_path):
    """SLM_LAUNCH=srun: ranks are SLURM's numbers, a request to stop is passed on, and 85 is said,
    not returned.
    """
    worker = tmp_path / "worker.py"
    worker.write_text(
        "import os, pathlib, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(int(os.environ['CODE'])))\n"
        "names = 'RANK LOCAL_RANK WORLD_SIZE LOCAL_WORLD_SIZE MASTER_ADDR MASTER_PORT'\n"
        "print(*[os.environ[name] for name in names.split()], flush=True)\n"
        "time.sleep(90)\n"
    )
    slurm = {
        "SLURM_PROCID": "5",
        "SLURM_LOCALID": "1",
        "SLURM_NTASKS": "8",
        "SLM_PROCESSES_PER_NODE": "4",
        "SLM_MASTER_ADDRESS": "node07",
        "SLM_MASTER_PORT": "12345",
        "SLURMD_NODENAME": "node08",
        "SLM_STOPPED_IS_SUCCESS": "yes",
    }
    endings = {
        "85": (0, "exit code 85: stopped on request; start the same command again to continue"),
        "4": (4, "exit code 4: process 5 on node08 failed first; its message is above"),
    }
    for code, (expected, sentence) in endings.items():
        process = subprocess.Popen(
            [sys.executable, ROOT / "launch" / "processes.py", "--slurm-task", worker],
            env={**os.environ, **slurm, "CODE": code},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            preexec_fn=_take_signals,
        )
        assert process.stdout.readline() == "5 1 8 4 node07 12345\n"
        process.send_signal(signal.SIGUSR1)
        _, said = process.communicate(timeout=90)
        assert (process.returncode, said) == (expected, f"processes.py: {sentence}\n")
