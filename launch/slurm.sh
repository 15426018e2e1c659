# Functions that the batch scripts share. Sourced first, after SLM_ROOT is known; launch/env.sh
# comes after it.
# shellcheck shell=bash

# How SLURM calls this job. The number of an array's job alone would mean the whole array.
SLM_JOB=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_${SLURM_ARRAY_TASK_ID:-0}}
SLM_JOB=${SLM_JOB:-${SLURM_JOB_ID:-}}
SLM_CHILD=

# slm_listen FUNCTION: from now on a signal to this script is kept in SLM_ASKED ("limit": the time
# limit nears; "ended": SLURM or scancel ends this start), and FUNCTION asks the running step to
# stop. Until a step runs, the signal is only kept.
slm_listen() {
    SLM_STOP_STEP=$1
    trap 'slm_asked limit' USR1
    trap 'slm_asked ended' TERM INT HUP
}

slm_asked() {
    local reason=$1
    SLM_INTERRUPTED=yes
    # The limit itself, where no warning came or the run is still saving: SLURM ends the processes
    # after KillWait, and a checkpoint that is complete by then is gone on from.
    if [ "$reason" = ended ] && slm_limit_reached; then reason=limit; fi
    # Whoever ends the job after a warning does not want it requeued.
    [ "${SLM_ASKED:-}" = ended ] || SLM_ASKED=$reason
    case $1-$reason in
        limit-*) echo "the time limit is near" ;;
        *-limit) echo "SLURM ends this start of the job: the time limit is reached" ;;
        *) echo "SLURM ends this start of the job" ;;
    esac
    [ -z "$SLM_CHILD" ] || "$SLM_STOP_STEP" || true
}

# Whether the job has run for as long as it may, as SLURM counts.
slm_limit_reached() {
    scontrol show job "$SLM_JOB" 2>/dev/null | awk '
        function seconds(time, part) {
            return split(time, part, /[-:]/) == 4 ? ((part[1] * 24 + part[2]) * 60 + part[3]) * 60 + part[4] \
                : (part[1] * 60 + part[2]) * 60 + part[3]
        }
        match($0, /RunTime=[0-9:-]+/) { ran = substr($0, RSTART + 8, RLENGTH - 8) }
        match($0, /TimeLimit=[0-9:-]+/) { limit = substr($0, RSTART + 10, RLENGTH - 10) }
        END { exit !(ran != "" && limit != "" && seconds(ran) >= seconds(limit)) }'
}

# slm_leave_if_asked: end here when a signal came before anything was started.
slm_leave_if_asked() {
    case ${SLM_ASKED:-} in
        limit)
            echo "not started, and not requeued: the warning before the time limit came before the work could begin. Give a longer" \
                "--time, or a shorter warning (--signal=B:USR1@SECONDS); the same command continues" >&2
            exit 85 ;;
        ended)
            echo "not started: SLURM ended this start before the work could begin; $(slm_what_slurm_does)" >&2
            exit 85 ;;
    esac
}

# slm_preflight MODULE ARGUMENTS...: check the settings, the inputs and the output folder in one
# task of one node, before the others start anything; prints the folder that the program writes.
# Exit code: the program's, with its sentence in the log.
slm_preflight() {
    if [[ $SLM_LAUNCH != torchrun && $SLM_LAUNCH != srun ]]; then
        echo "SLM_LAUNCH: got '$SLM_LAUNCH'; expected torchrun or srun" >&2
        return 2
    fi
    if ! [[ $SLM_MAX_REQUEUES =~ ^[0-9]+$ ]]; then
        echo "SLM_MAX_REQUEUES: got '$SLM_MAX_REQUEUES'; expected a number of starts" >&2
        return 2
    fi
    if ! [[ $SLM_NODES =~ ^[1-9][0-9]*$ && $SLM_NODES -le $SLURM_JOB_NUM_NODES ]]; then
        echo "SLM_NODES: got '$SLM_NODES'; expected a number of nodes up to $SLURM_JOB_NUM_NODES, which the job has" >&2
        return 2
    fi
    WORLD_SIZE=$((SLM_NODES * SLM_PROCESSES_PER_NODE)) srun --nodes=1 --ntasks=1 "${SLM_SRUN_OPTIONS[@]}" "${SLM_CONTAINER[@]}" \
        python -m "$@" --check_only
}

# slm_not_started CODE: the preflight ended with CODE; end as it did.
slm_not_started() {
    slm_leave_if_asked
    echo "nothing was started: the check of settings and inputs ended with exit code $1; its message is above" >&2
    exit "$1"
}

# slm_take_nodes NODELIST: the first SLM_NODES of these nodes do the work; the others of the
# allocation are spare.
slm_take_nodes() {
    local nodes
    mapfile -t nodes < <(scontrol show hostnames "$1")
    SLM_WORKING_NODES=$(IFS=,; echo "${nodes[*]:0:SLM_NODES}")
    [ "${#nodes[@]}" -ge "$SLM_NODES" ]
}

# Where rank 0 is reached, and a port that two jobs on its node do not share; it changes with every
# restart of the same job.
slm_rendezvous() {
    local starts=$(( ${SLURM_RESTART_COUNT:-0} + ${SLM_NODES_LOST:-0} ))
    : "${SLM_MASTER_ADDRESS:=${SLM_WORKING_NODES%%,*}}"
    SLM_MASTER_PORT=$(( 10000 + (SLURM_JOB_ID + 101 * starts) % 20000 ))
    export SLM_MASTER_ADDRESS SLM_MASTER_PORT
}

# slm_run MODULE ARGUMENTS...: run the step; again on the nodes that are left when SLURM took one
# from the job and enough are left, which needs sbatch --no-kill and spare nodes. SLM_NODES_LOST
# counts how often.
slm_run() {
    SLM_NODES_LOST=0
    slm_run_step "$@"
    while slm_lost_a_node; do
        SLM_NODES_LOST=$((SLM_NODES_LOST + 1))
        slm_take_nodes "$SLM_NODES_LEFT" || { echo "SLURM took a node from the job, and $SLM_NODES_LEFT is not enough" >&2; return; }
        slm_rendezvous
        echo "SLURM took a node from the job: going on with $SLM_WORKING_NODES, rendezvous $SLM_MASTER_ADDRESS:$SLM_MASTER_PORT"
        slm_run_step "$@"
    done
}

# Whether the step failed because SLURM took one of its nodes from the job; SLM_NODES_LEFT is what
# the job has now.
slm_lost_a_node() {
    local node left
    [ -z "${SLM_ASKED:-}" ] || return 1
    case $SLM_EXIT_CODE in 0 | 2 | 3 | 4 | 85 | 86) return 1 ;; esac # the run's own verdict
    SLM_NODES_LEFT=$(scontrol show job "$SLM_JOB" | sed -n 's/^ *NodeList=//p') || return 1
    left=$(scontrol show hostnames "$SLM_NODES_LEFT") || return 1
    for node in ${SLM_WORKING_NODES//,/ }; do
        grep -qxF "$node" <<<"$left" || return 0
    done
    return 1
}

# slm_run_step MODULE ARGUMENTS...: SLM_PROCESSES_PER_NODE processes on every node, to their end;
# SLM_EXIT_CODE is the run's.
#
# srun's own exit code is the largest of all nodes': the first node that fails has the others ended,
# and their 143 hides its code. So launch/processes.py says on standard error how its processes
# ended, and what it says is read here. It needs no file that every node sees, which a disk that
# fails would take with it.
slm_run_step() {
    local messages answer code='' stopped=''
    coproc SLM_READER { trap '' TERM INT HUP USR1; slm_read_endings; }
    exec {messages}>&"${SLM_READER[1]}" {answer}<&"${SLM_READER[0]}" {SLM_READER[1]}>&-
    slm_srun "$@" 2>&"$messages" {messages}>&- {answer}<&- &
    SLM_CHILD=$!
    exec {messages}>&-
    [ -z "${SLM_ASKED:-}" ] || "$SLM_STOP_STEP" || true # asked between the last look and now
    slm_wait "$SLM_CHILD"
    SLM_CHILD=
    read -r code stopped <&"$answer" || true
    exec {answer}<&-
    [ -z "$code" ] || SLM_EXIT_CODE=$code
    # The processes do not end in the same instant, and one that misses another before it is done
    # says so with a code.
    if [ -n "${SLM_ASKED:-}" ] && [ -n "$stopped" ]; then
        case $code in 1 | 134 | 143) SLM_EXIT_CODE=85 ;; esac
    fi
}

# One torchrun per node, or (SLM_LAUNCH=srun) one task per process. Node ranks are SLURM's, so rank
# order follows node order and tensor-parallel neighbours share a node.
slm_srun() {
    local tasks_per_node=1 cpus=() processes
    # shellcheck disable=SC2016  # expanded on each node
    processes='--nnodes="$SLM_NODES" --node-rank="$SLURM_NODEID" --nproc-per-node="$SLM_PROCESSES_PER_NODE" '
    processes+='--max-restarts=0 --master-addr="$SLM_MASTER_ADDRESS" --master-port="$SLM_MASTER_PORT"'
    # Since SLURM 22.05 srun no longer inherits the batch job's --cpus-per-task and would give each
    # node's task a single core.
    [ -z "${SLURM_CPUS_PER_TASK:-}" ] || cpus=(--cpus-per-task="$SLURM_CPUS_PER_TASK")
    case $SLM_LAUNCH in
        torchrun) ;;
        srun)
            tasks_per_node=$SLM_PROCESSES_PER_NODE processes=--slurm-task
            cpus=(--cpus-per-task="$(( ${SLURM_CPUS_ON_NODE:-1} / tasks_per_node > 0 ? ${SLURM_CPUS_ON_NODE:-1} / tasks_per_node : 1 ))") ;;
    esac
    exec env SLM_STOPPED_IS_SUCCESS=yes srun --nodes="$SLM_NODES" --nodelist="$SLM_WORKING_NODES" \
        --ntasks="$((SLM_NODES * tasks_per_node))" --ntasks-per-node="$tasks_per_node" --distribution=block "${cpus[@]}" --kill-on-bad-exit=1 "${SLM_SRUN_OPTIONS[@]}" "${SLM_CONTAINER[@]}" \
        bash -c 'exec python "$SLM_ROOT/launch/processes.py" '"$processes"' -m "$@"' slm "$@"
}

# Copies what the nodes say to the log; at the end, prints the exit code that counts among theirs
# (nothing if none said one), and "stopped" if one of them said 85.
#
# A code that a program gives on purpose (2, 3, 4, 86) is never the consequence of another's end,
# and neither is a death by SIGKILL, SIGSEGV and the like. A process that lost another one ends with
# 1, with 134 (NCCL's watchdog), or, told by SLURM to end, with 143 or 85.
slm_read_endings() {
    local line code weight best='' best_weight=0 stopped=''
    while IFS= read -r line || [ -n "$line" ]; do
        printf '%s\n' "$line" >&2 || true
        [[ $line =~ ^processes\.py:\ exit\ code\ ([0-9]+): ]] || continue
        code=${BASH_REMATCH[1]}
        case $code in
            2 | 3 | 4 | 86) weight=3 ;;
            1 | 134 | 143) weight=1 ;;
            85) weight=1 stopped=stopped ;;
            *) weight=2 ;;
        esac
        [ "$weight" -le "$best_weight" ] || best=$code best_weight=$weight
    done
    printf '%s %s\n' "$best" "$stopped"
}

# slm_wait PID: wait to the end even when signals interrupt; the exit code is in SLM_EXIT_CODE.
# Traps set SLM_INTERRUPTED=yes.
slm_wait() {
    SLM_INTERRUPTED=yes
    while [ -n "$SLM_INTERRUPTED" ]; do
        SLM_INTERRUPTED=
        SLM_EXIT_CODE=0
        wait "$1" || SLM_EXIT_CODE=$?
    done
}

# slm_signal_step: ask the processes of the running step to stop, on all nodes. Not through srun,
# which may swallow or repeat a signal. Without --batch, scancel leaves this script alone.
slm_signal_step() {
    scancel --signal=USR1 "$SLM_JOB"
}

# slm_requeue UNIT BEFORE AFTER [ALL]: put this job back into the queue. Not when this start gained
# nothing (of the UNITs, BEFORE were done when it began and AFTER are now), nor when
# SLM_MAX_REQUEUES starts cannot be enough for ALL of them at its pace.
slm_requeue() {
    local gained=$(($3 - $2)) left=$(( ${4:-$3} - $3 )) starts=${SLURM_RESTART_COUNT:-0} advice
    advice="A longer time limit (--time) or a shorter warning before it (--signal=B:USR1@SECONDS) may help; the same command continues"
    if [ "$gained" -le 0 ]; then
        echo "not requeued: this start of the job made no progress (at $1 $3). $advice" >&2
    elif [ "$starts" -ge "$SLM_MAX_REQUEUES" ]; then
        echo "not requeued: the job was put back $starts times, and SLM_MAX_REQUEUES is $SLM_MAX_REQUEUES. Submit the same command" \
            "to continue at $1 $3" >&2
    elif [ $(( (left + gained - 1) / gained )) -gt $(( SLM_MAX_REQUEUES - starts )) ]; then
        echo "not requeued: this start went from $1 $2 to $3 of $4; at this pace the rest takes $(( (left + gained - 1) / gained ))" \
            "more starts, and SLM_MAX_REQUEUES ($SLM_MAX_REQUEUES) leaves $(( SLM_MAX_REQUEUES - starts )). $advice" >&2
    else
        echo "requeueing job $SLM_JOB, which went from $1 $2 to $3"
        scontrol requeue "$SLM_JOB" && return
        echo "not requeued: scontrol refused (its message is above); the same command continues" >&2
    fi
    return 1
}

# A sentence on what SLURM does with a job that it has told to end: one that goes back into the
# queue is counted at once.
slm_what_slurm_does() {
    local restarts
    restarts=$(scontrol show job "$SLM_JOB" 2>/dev/null | sed -n 's/.* Restarts=\([0-9]\{1,\}\).*/\1/p') || true
    if [ -z "$restarts" ]; then
        echo "this script does not requeue it; if SLURM does not either, submit the same command to continue"
    elif [ "$restarts" -gt "${SLURM_RESTART_COUNT:-0}" ]; then
        echo "SLURM has put the job back into the queue, where it continues"
    else
        echo "SLURM has not put the job back into the queue; submit the same command to continue"
    fi
}
