# Settings of your cluster, in one place: every script in launch/ reads this file. Copy it, edit it,
# and point SLM_ENV at the copy, or edit it here. Anything already exported wins over what stands
# below.
# shellcheck shell=bash disable=SC2034  # variables are read by the scripts that source this file

# --- Software: keep one of the three. -------------------------------------------------------------
# 1. A virtual environment on the shared file system (default: .venv of this checkout).
: "${SLM_VENV:=$SLM_ROOT/.venv}"
if [ -f "$SLM_VENV/bin/activate" ]; then
    # shellcheck disable=SC1091
    source "$SLM_VENV/bin/activate"
fi
# 2. Modules.
# module purge; module load cuda/12.8 python/3.11
# 3. A container; the image is built by the Dockerfile. The checkout must be visible inside under the same path.
# pyxis/enroot, whose options are srun's own:
# SLM_SRUN_OPTIONS=(--container-image=/shared/images/megatron-slm.sqsh --container-mounts=/shared:/shared --no-container-mount-home)
declare -p SLM_SRUN_OPTIONS >/dev/null 2>&1 || SLM_SRUN_OPTIONS=()
# apptainer, a command that starts each node's processes:
# SLM_CONTAINER=(apptainer exec --nv --bind /shared:/shared /shared/images/megatron-slm.sif)
declare -p SLM_CONTAINER >/dev/null 2>&1 || SLM_CONTAINER=()

# --- Processes and threads. -----------------------------------------------------------------------
# One process per GPU; without GPUs, say how many CPU processes a node runs.
: "${SLM_PROCESSES_PER_NODE:=${SLURM_GPUS_ON_NODE:-1}}"
: "${OMP_NUM_THREADS:=$(( ${SLURM_CPUS_ON_NODE:-$(nproc)} / SLM_PROCESSES_PER_NODE ))}"
[ "$OMP_NUM_THREADS" -ge 1 ] || OMP_NUM_THREADS=1
: "${SLM_LAUNCH:=torchrun}"          # torchrun: one per node starts the node's processes. srun: SLURM starts every process itself
: "${SLM_MAX_REQUEUES:=200}"         # a job is not put back into the queue more often than this

: "${SLM_NODES:=${SLURM_JOB_NUM_NODES:-1}}" # nodes that do the work; fewer than the job has = the others are spare
export SLM_LAUNCH SLM_MAX_REQUEUES SLM_NODES

# --- Network. -------------------------------------------------------------------------------------
: "${NCCL_DEBUG:=WARN}"
: "${TORCH_NCCL_ASYNC_ERROR_HANDLING:=1}"   # a rank that fails ends the job instead of leaving the others waiting
# : "${NCCL_SOCKET_IFNAME:=ib0}"            # the interface NCCL bootstraps over, when the default one is wrong
# : "${NCCL_IB_HCA:=mlx5}"
# : "${GLOO_SOCKET_IFNAME:=ib0}"            # the same for CPU processes
# : "${SLM_MASTER_ADDRESS:=$(hostname)-ib0}" # where the first node is reached, when not under its name in SLURM

# --- Files. ---------------------------------------------------------------------------------------
# W&B keys never belong here: run `wandb login` once, or export WANDB_API_KEY in your shell profile.
: "${WANDB_CACHE_DIR:=${TMPDIR:-/tmp}/wandb-cache-${USER:-slm}}"
export SLM_VENV SLM_PROCESSES_PER_NODE OMP_NUM_THREADS NCCL_DEBUG TORCH_NCCL_ASYNC_ERROR_HANDLING WANDB_CACHE_DIR
export CUDA_DEVICE_MAX_CONNECTIONS="${CUDA_DEVICE_MAX_CONNECTIONS:-1}"  # megatron-core's overlap of tensor-parallel communication needs 1
export PYTHONPATH="$SLM_ROOT${PYTHONPATH:+:$PYTHONPATH}"
