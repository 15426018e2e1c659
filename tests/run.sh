#!/usr/bin/env bash
# Lint, format, types, and all tests that need no GPU. Makes the virtual environment when there is none.
#
#   bash tests/run.sh                        everything but the tests marked slow or gpu
#   bash tests/run.sh tests/unit/selection   these files or folders instead of all
#   bash tests/run.sh -k selection           further options go to pytest
#   bash tests/run.sh -m slow                the slow ones instead
#   bash tests/run.sh -n 0 --pdb             in one process
#   bash tests/run.sh --core 0.19.2          under another megatron-core (`--core other`: the supported one that is not
#                                            installed): what depends on its version, in a few minutes. Makes
#                                            .venv-core-0.19.2, which adds that package alone to the environment
#
# Works from any folder; nothing is sent anywhere. Exit code 0 when ruff and mypy found nothing and every test passed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

core=
if [ "${1:-}" = --core ]; then
    core=${2:?"--core needs a version of megatron-core, such as 0.19.2"}
    shift 2
    source tests/other_core.sh
fi

# The rules, and the reason for each that is left out, are in pyproject.toml. `ruff check --fix .` and `ruff format .` mend most.
if [ -z "$core" ]; then
    ruff check .
    ruff format --check .
    mypy
fi

# One thread per process: distributed tests start up to eight processes, and threads that wait for a core spin.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline WANDB_SILENT=true
export CUDA_VISIBLE_DEVICES=     # two processes of a test must not share one GPU; tests/gpu is run by itself: pytest -m gpu tests/gpu

# Named files and folders replace the default, which is every test file and folder but tests/gpu.
places=(tests/test_*.py tests/unit tests/distributed tests/end_to_end tests/slurm)
[ -z "$core" ] || places=("${other_core_places[@]}")
for argument in "$@"; do
    [ ! -e "${argument%%::*}" ] || places=()
done

# Files run beside each other on up to four cores; of tests of several processes two run at a time, one of
# tests/distributed and one of the others (tests/scheduling.py). Of options given twice the last counts. A hung
# collective fails its test after the time limit.
exec python -m pytest -q -n logical --maxprocesses=4 --dist loadfile --durations=15 --durations-min=1 --timeout=900 \
    -m "not slow and not gpu" "${places[@]}" "$@"
