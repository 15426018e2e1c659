"""Stand-ins for srun, scontrol, scancel and python, for the real scripts of launch/ under bash."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

LAUNCH = Path(__file__).parents[3] / "launch"

STOP_SIGNALS = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1]

SRUN = r"""#!/bin/bash
# Runs the command as the first node would, after noting the options. Of several nodes that do not
# all end with 0, it says 143, as the real one does when it has ended the others.
printf '%s\n' "$*" >> "$SCRATCH/srun.log"
nodes=${1#--nodes=}
while [[ $1 == --* ]]; do shift; done
export SLURM_NODEID=0 SLURM_PROCID=0
"$@"
code=$?
[ "$nodes" = 1 ] || [ $code = 0 ] || exit 143
exit $code
"""
SCONTROL = r"""#!/bin/bash
printf '%s\n' "$*" >> "$SCRATCH/scontrol.log"
case "$1 $2" in
    "show hostnames") tr , '\n' <<<"${3/"node[07-08]"/node07,node08}" ;;
    "show job")
        echo "   Requeue=1 Restarts=${RESTARTS:-0} BatchFlag=1"
        echo "   RunTime=${RAN:-23:00:00} TimeLimit=1-00:00:00 TimeMin=N/A"
        echo "   ReqNodeList=(null) ExcNodeList=(null)"
        echo "   NodeList=${NODES_LEFT:-$SLURM_JOB_NODELIST}" ;;
    requeue*) exit "${REFUSED:-0}" ;;
esac
"""
SCANCEL = r"""#!/bin/bash
printf '%s\n' "$*" >> "$SCRATCH/scancel.log"
kill -USR1 "$(cat "$SCRATCH/worker")"
"""
# Plays the programs, and processes.py with its trainers or scorers, which says how they ended.
# WORK says how: a number = at once with that exit code; save, stall, score = when asked to stop.
# WORK_AGAIN says it for a second step.
PYTHON = r"""#!/bin/bash
if [[ "$*" == *programs.py* ]]; then exec "$REAL_PYTHON" "$@"; fi
if [[ "$*" == *--print_run_folder* ]]; then printf '%s\n' "$RUN_FOLDER"; exit 0; fi
if [[ "$*" == *--check_only* ]]; then
    printf '%s\n' "$*" "WORLD_SIZE=$WORLD_SIZE" >> "$SCRATCH/check.log"
    touch "$SCRATCH/checking"
    sleep "${CHECK_SECONDS:-0}"
    if [[ "$*" == *--nonsense* ]]; then echo "nonsense: unknown field" >&2; exit 2; fi
    path=$RUN_FOLDER
    if [[ "$*" == *megatron_slm.score* ]]; then path=$STORE; fi
    printf '%s\n' "$path"
    exit "${CHECKED:-0}"
fi
leave() {
    [ "$1" = 0 ] || echo "processes.py: exit code $1: as the stand-in says" >&2
    [ "$1" != 85 ] || [ -z "$SLM_STOPPED_IS_SUCCESS" ] || exit 0
    exit "$1"
}
printf '%s\n' "$*" >> "$SCRATCH/python.log"
echo $$ > "$SCRATCH/worker"
trap 'echo asked >> "$SCRATCH/signals.log"; leave "${WHEN_ASKED:-85}"' TERM USR1
[ -e "$RUN_FOLDER/stop_requested" ] && touch "$SCRATCH/stop_file_seen"
[ "$WORK" = score ] && mkdir -p "$STORE/shards" && touch "$STORE/shards/shard_${SHARD:-000003}.json"
save() {
    mkdir -p "$RUN_FOLDER/checkpoints"
    echo "step_000000$1" > "$RUN_FOLDER/checkpoints/latest"
}
status='{\n  "steps": %s,\n  "exit_code": null\n}\n'
[ -z "$STEPS" ] || printf "$status" "$STEPS" > "$RUN_FOLDER/status.json"
[ -z "$SAVED" ] || save "$SAVED"
[ -e "$SCRATCH/started" ] && WORK=${WORK_AGAIN:-$WORK}
touch "$SCRATCH/started"
case $WORK in
    [0-9]*) leave "$WORK" ;;
    score) while sleep 0.05; do :; done ;;
    *) while [ ! -f "$RUN_FOLDER/stop_requested" ]; do sleep 0.05; done
       rm "$RUN_FOLDER/stop_requested"
       [ "$WORK" != save ] || save 42
       leave 85 ;;
esac
"""


class Cluster:
    """A checkout and a PATH of stand-ins in a temporary folder."""

    def __init__(self, folder: Path):
        # Quotes, and so long that YAML would fold it at its spaces.
        self.folder = folder
        self.run_folder = folder / 'the lab\'s "shared" disk' / " and on".join(["on"] * 20) / "run"
        shutil.copytree(LAUNCH, folder / "launch")
        for program in (
            "megatron_slm/train.py",
            "megatron_slm/report.py",
            "data_tools/preprocess.py",
        ):
            (folder / program).parent.mkdir(exist_ok=True)
            shutil.copy(LAUNCH.parent / program, folder / program)
        programs = folder / "bin"
        programs.mkdir()
        stand_ins = {"srun": SRUN, "scontrol": SCONTROL, "scancel": SCANCEL, "python": PYTHON}
        for name, text in stand_ins.items():
            (programs / name).write_text(text)
            (programs / name).chmod(0o755)
        self.environment = {
            "PATH": f"{programs}:{os.environ['PATH']}",
            "SCRATCH": str(folder),
            "REAL_PYTHON": sys.executable,
            "RUN_FOLDER": str(self.run_folder),
            "STORE": str(folder / "the lab's store"),
            "SLM_VENV": "/nonexistent",
            "SLURM_SUBMIT_DIR": str(folder),
            "SLURM_JOB_ID": "123456",
            "SLURM_JOB_NUM_NODES": "2",
            "SLURM_JOB_NODELIST": "node[07-08]",
            "SLURM_GPUS_ON_NODE": "8",
            "SLURM_CPUS_PER_TASK": "64",
            "SLURM_CPUS_ON_NODE": "64",
        }

    def start(
        self, script: str, *arguments: str, work: str, **environment: str
    ) -> subprocess.Popen:
        spool = self.folder / "spool"  # SLURM runs a copy of the script from elsewhere
        spool.mkdir(exist_ok=True)
        (self.folder / "started").unlink(missing_ok=True)
        copy = (
            shutil.copy(self.folder / "launch" / script, spool / "slurm_script")
            if script.endswith(".sbatch")
            else self.folder / "launch" / script
        )
        return subprocess.Popen(
            ["bash", copy, *arguments],
            env={**self.environment, "WORK": work, **environment},
            cwd=spool,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=_take_interrupts,
        )

    def run(
        self,
        script: str,
        *arguments: str,
        work: str,
        send: int | None = None,
        when: str = "started",
        **environment: str,
    ) -> tuple[int, str]:
        process = self.start(script, *arguments, work=work, **environment)
        if send is not None:
            self.wait_for(when, process)
            process.send_signal(send)
        try:
            output, _ = process.communicate(timeout=60)
        finally:
            process.kill()
        return process.returncode, output

    def wait_for(self, name: str, process: subprocess.Popen) -> None:
        deadline = time.monotonic() + 30
        while not (self.folder / name).exists():
            assert process.poll() is None, process.communicate()[0]
            assert time.monotonic() < deadline, f"{name} has not come within 30 seconds"
            time.sleep(0.02)

    def log(self, name: str) -> list[str]:
        path = self.folder / f"{name}.log"
        return path.read_text().splitlines() if path.exists() else []

    def requeued(self) -> list[str]:
        return [line for line in self.log("scontrol") if line.startswith("requeue")]


def _take_interrupts() -> None:
    """bash cannot trap what was ignored when it started, in the background or under nohup."""
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_DFL)


TRAIN = ("--config", "recipe with spaces.yaml", "--selection.keep_fraction", "0.6")
