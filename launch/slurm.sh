# Functions that the batch scripts share. Sourced, after SLM_ROOT and launch/env.sh.
# shellcheck shell=bash

# First node of the allocation and a port that two jobs on it do not share; the port changes with every restart of the same job.
slm_rendezvous() {
    # sed reads to the end; `head -n 1` would let scontrol die of a closed pipe, and pipefail the job with it.
    SLM_MASTER_ADDRESS=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | sed -n 1p)
    SLM_MASTER_PORT=$(( 10000 + (SLURM_JOB_ID + 101 * ${SLURM_RESTART_COUNT:-0}) % 20000 ))
    export SLM_MASTER_ADDRESS SLM_MASTER_PORT
}

# slm_srun_torchrun MODULE ARGUMENTS...: one torchrun per node, SLM_PROCESSES_PER_NODE processes under each.
# Node ranks are SLURM's, so rank order follows node order and tensor-parallel neighbours share a node.
slm_srun_torchrun() {
    local cpus=()
    # Since SLURM 22.05 srun no longer inherits the batch job's --cpus-per-task and would give each node's task a single core.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || cpus=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    # shellcheck disable=SC2016  # expanded on each node
    exec srun --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 "${cpus[@]}" --kill-on-bad-exit=1 \
        "${SLM_SRUN_OPTIONS[@]}" bash -c 'exec python "$SLM_ROOT/launch/processes.py" --nnodes="$SLURM_JOB_NUM_NODES" \
            --node-rank="$SLURM_NODEID" --nproc-per-node="$SLM_PROCESSES_PER_NODE" --max-restarts=0 \
            --master-addr="$SLM_MASTER_ADDRESS" --master-port="$SLM_MASTER_PORT" -m "$@"' slm "$@"
}

# slm_wait PID: wait to the end even when signals interrupt; the exit code is in SLM_EXIT_CODE. Traps set SLM_INTERRUPTED=yes.
slm_wait() {
    SLM_INTERRUPTED=yes
    while [ -n "$SLM_INTERRUPTED" ]; do
        SLM_INTERRUPTED=
        SLM_EXIT_CODE=0
        wait "$1" || SLM_EXIT_CODE=$?
    done
}

# slm_requeue BEFORE AFTER: put this job back into the queue, unless nothing was gained since it started (BEFORE equals AFTER).
slm_requeue() {
    if [ "$1" = "$2" ]; then
        echo "not requeued: this start of the job made no progress ($2); a longer time limit or a longer warning before it may help" >&2
        return 1
    fi
    echo "requeueing job $SLURM_JOB_ID"
    scontrol requeue "$SLURM_JOB_ID"
}
