# Sourced by tests/run.sh --core VERSION, after launch/venv.sh: an environment with another megatron-core.
#
# It is thin: a folder whose packages are those of the active environment, behind a megatron-core of
# its own. Leaves its bin folder first on PATH, and SLM_OTHER_CORE_PYTHON naming the Python of the
# environment it stands on, so that tests can write a checkpoint under one and continue it under the other.

other_core_environment() {
    local base=$VIRTUAL_ENV environment packages stamp
    core=$("$base/bin/python" -c '
import sys
from megatron_slm.core_versions import SUPPORTED, core_version
others = [version for version in SUPPORTED if version != core_version()]
wanted = others[0] if sys.argv[1] == "other" else sys.argv[1]
if wanted not in others:
    sys.exit(f"--core {wanted}: this environment has {core_version()}, and the other one can be {others[0]}")
print(wanted)' "$core") || return 2
    environment=$PWD/.venv-core-$core
    packages=$("$base/bin/python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))') || return 1
    stamp="$core over $packages, $("$base/bin/python" -V)"
    if [ "$(cat "$environment/.stamp" 2>/dev/null)" != "$stamp" ]; then
        echo "making $environment with megatron-core $core" >&2
        rm -rf "$environment"
        "$base/bin/python" -m venv "$environment" || return 1
        # addsitedir and no plain path: it follows the .pth files there too.
        echo "import site; site.addsitedir('$packages')" >"$("$environment/bin/python" -c \
            'import sysconfig; print(sysconfig.get_path("purelib"))')/environment_below.pth" || return 1
        # 0.19.2's metadata asks for Python 3.12; its wheel for 3.11 works.
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --ignore-installed \
            --ignore-requires-python "megatron-core==$core" || return 1
        echo "$stamp" >"$environment/.stamp"
    fi
    export PATH="$environment/bin:$PATH" VIRTUAL_ENV="$environment" SLM_OTHER_CORE_PYTHON="$base/bin/python"
}
other_core_environment || exit

# What depends on the version; of the layouts a few.
export SLM_LAYOUTS=short
other_core_places=(
    tests/test_megatron_core_*.py tests/unit/test_core_versions.py tests/unit/test_device.py tests/unit/model tests/unit/checkpoint
    tests/unit/ops/test_row_skipping.py tests/unit/ops/test_against_megatron_head.py tests/unit/data/test_scored_dataset.py
    tests/unit/data/test_epoch_index.py tests/end_to_end/test_examples.py
    tests/unit/convert/test_stored_state.py
    tests/distributed/test_layouts.py tests/distributed/test_experts.py tests/distributed/test_other_core.py
    tests/distributed/test_resharding.py tests/distributed/test_resume.py tests/distributed/test_head_in_training.py
    tests/distributed/test_rows_in_training.py tests/distributed/test_optimizer_step.py tests/distributed/test_save_failures.py
)
