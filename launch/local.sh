#!/usr/bin/env bash
# Run train, score or evaluate with N processes on this machine.
#
#   bash launch/local.sh 2 train --config launch/recipes/quickstart.yaml --run.folder runs/mine
#   bash launch/local.sh 2 score --checkpoint runs/reference --corpus data/corpus --output data/corpus_scores
#   bash launch/local.sh 2 evaluate --checkpoint runs/mine
#
# Ctrl-C asks it to stop: training saves a checkpoint within a few steps, scoring keeps its finished
# shards. A second Ctrl-C stops at once. SIGTERM, SIGUSR1 and SIGHUP (a closed terminal) ask too,
# and so does the end of this script. Exit codes are the program's: 0 done, 2 bad configuration, 3
# bad data, 85 stopped (the same command continues).
set -euo pipefail

SLM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export SLM_ROOT
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,${/^#/!q; s/^# \{0,1\}//p;}' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
export SLM_PROCESSES_PER_NODE=$1
program=$2
shift 2
# shellcheck source=launch/env.sh
source "${SLM_ENV:-$SLM_ROOT/launch/env.sh}"
# shellcheck source=launch/slurm.sh
source "$SLM_ROOT/launch/slurm.sh"
python "$SLM_ROOT/launch/programs.py" "$program" || exit $?
for word in "$@"; do
    case $word in -h | --help | --version | --print_* | --check?only) exec python -m "megatron_slm.$program" "$@" ;; esac
done
child=
asked=
stop() {
    SLM_INTERRUPTED=yes
    local now_us=${EPOCHREALTIME/[.,]/}
    if [ -z "$asked" ]; then
        asked=$now_us
        # The terminal may be closed.
        echo "stopping $program${child:+; once more to stop at once}" >&2 2>/dev/null || true
        [ -n "$child" ] || exit 85
        kill -TERM "$child" 2>/dev/null || true
    elif [ $((now_us - asked)) -gt 500000 ]; then # `timeout` and others send one request twice
        kill -INT "$child" 2>/dev/null || true
    fi
}
trap stop INT TERM HUP USR1
trap '' PIPE # the program this one is piped into may be gone: no reason to leave the workers alone

# Settings, and everything that they name, are looked at by one process before torchrun starts: when
# rank 0 alone refuses a run, torchrun waits 30 seconds for the others. The page of --preflight
# shows what is wrong itself.
look=--check_only
case " $* " in *" --preflight "*) look=--print_run_folder ;; esac
WORLD_SIZE=$SLM_PROCESSES_PER_NODE python -m "megatron_slm.$program" "$@" $look >/dev/null || exit $?

# A session of its own: the terminal's Ctrl-C reaches this script, not the workers in the middle of a step.
SLM_LAUNCHER_PID=$$ setsid python "$SLM_ROOT/launch/processes.py" --standalone \
    --nproc-per-node="$SLM_PROCESSES_PER_NODE" --max-restarts=0 -m "megatron_slm.$program" "$@" &
child=$!
slm_wait "$child"
exit "$SLM_EXIT_CODE"
