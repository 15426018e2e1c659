#!/usr/bin/env bash
# Lint, format, and all tests that need no GPU, the cheap ones first. Makes the virtual environment when there is none.
#
#   bash tests/run.sh                    everything but the tests marked slow or gpu
#   bash tests/run.sh -k selection       further options go to pytest
#   bash tests/run.sh -m slow            the slow ones instead
#
# Works from any folder; nothing is sent anywhere. Exit code 0 when ruff found nothing and every test passed.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
source launch/venv.sh

# The rules, and the reason for each that is left out, are in pyproject.toml. `ruff check --fix .` and `ruff format .` mend most.
ruff check .
ruff format --check .

# One thread per process: distributed tests start up to eight processes, and threads that wait for a core spin.
export OMP_NUM_THREADS=1 MKL_NUM_THREADS=1 TOKENIZERS_PARALLELISM=false WANDB_MODE=offline WANDB_SILENT=true
export CUDA_VISIBLE_DEVICES=     # two processes of a test must not share one GPU; tests/gpu is run by itself: pytest -m gpu tests/gpu
places=()
for place in tests/test_architecture.py tests/test_code_style.py tests/test_references.py tests/unit tests/test_megatron_core_surface.py tests/test_method_points.py tests/distributed tests/end_to_end tests/slurm; do
    [ ! -e "$place" ] || places+=("$place")
done
# pytest keeps the order of its arguments, and the last -m wins. A hung collective fails its test after the time limit.
exec python -m pytest -q --durations=15 --durations-min=1 --timeout=900 -m "not slow and not gpu" "${places[@]}" "$@"
