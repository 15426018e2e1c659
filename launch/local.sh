#!/usr/bin/env bash
# Run a program of this project with N processes on this machine.
#
#   bash launch/local.sh 2 train --config launch/recipes/quickstart.yaml --run.folder runs/mine
#   bash launch/local.sh 2 score --checkpoint runs/reference --corpus data/corpus --output data/corpus_scores
#
# Ctrl-C (or SIGTERM) asks a training run to stop with a checkpoint after the step it is in; a second one stops at once.
# Exit codes are the program's: 0 done, 2 bad configuration, 3 bad data, 4 training failed or could not be saved,
# 85 stopped on request (the same command continues; a training run has saved its checkpoint).
set -euo pipefail

SLM_ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
export SLM_ROOT
if [ $# -lt 2 ] || ! [[ $1 =~ ^[1-9][0-9]*$ ]]; then
    sed -n '2,10s/^# \{0,1\}//p' "${BASH_SOURCE[0]}" >&2
    exit 2
fi
export SLM_PROCESSES_PER_NODE=$1
program=$2
shift 2
# shellcheck source=launch/env.sh
source "${SLM_ENV:-$SLM_ROOT/launch/env.sh}"
# shellcheck source=launch/slurm.sh
source "$SLM_ROOT/launch/slurm.sh"

stop_file=
if [ "$program" = train ]; then
    config=$(python -m megatron_slm.train "$@" --print_config) || exit $?
    run_folder=$(sed -n '/^run:/,/^[^ ]/s/^  folder: //p' <<<"$config" | sed "s/^'\(.*\)'\$/\1/")
    stop_file="$run_folder/stop_requested"
    rm -f "$stop_file"
fi

asked=
stop() {
    SLM_INTERRUPTED=yes
    if [ -n "$stop_file" ] && [ -z "$asked" ]; then
        echo "stopping with a checkpoint after this step; once more to stop at once" >&2
        mkdir -p "$(dirname "$stop_file")"
        touch "$stop_file"
    else
        kill -TERM -- "-$child" 2>/dev/null || true
    fi
    asked=yes
}
trap stop INT TERM

# A session of its own: the terminal's Ctrl-C reaches this script, not the workers in the middle of a step.
setsid python "$SLM_ROOT/launch/processes.py" --standalone --nproc-per-node="$SLM_PROCESSES_PER_NODE" --max-restarts=0 -m "megatron_slm.$program" "$@" &
child=$!
slm_wait "$child"
exit "$SLM_EXIT_CODE"
