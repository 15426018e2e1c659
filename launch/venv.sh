# Sourced by launch/quickstart.sh and tests/run.sh, from the project's root: a virtual environment
# with everything installed.
#
# Uses the active environment when there is one, else .venv; installs again whenever
# requirements.txt or pyproject.toml changed. Leaves the environment's bin folder first on PATH.

slm_python() {
    local candidate
    for candidate in "${PYTHON:-}" python3.11 python3 python; do
        if [ -n "$candidate" ] && "$candidate" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
            echo "$candidate"
            return
        fi
    done
    echo "Python 3.11 is needed (megatron-core's wheel is built for it) and was not found; install it, or set PYTHON=/path/to/python3.11" >&2
    return 1
}

slm_environment() {
    local environment=${VIRTUAL_ENV:-$PWD/.venv} python stamp
    if [ ! -x "$environment/bin/python" ]; then
        python=$(slm_python) || return 1
        echo "making a virtual environment in $environment" >&2
        "$python" -m venv "$environment" || return 1
    fi
    "$environment/bin/python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' ||
        { echo "the virtual environment $environment is not Python 3.11; deactivate it, or make one with python3.11 -m venv" >&2; return 1; }
    export PATH="$environment/bin:$PATH" VIRTUAL_ENV="$environment"
    stamp="$(cat requirements.txt pyproject.toml | sha256sum) $PWD"
    [ "$(cat "$environment/.megatron_slm_stamp" 2>/dev/null)" != "$stamp" ] || return 0
    echo "installing requirements.txt (a few minutes the first time)" >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt &&
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable . &&
        echo "$stamp" >"$environment/.megatron_slm_stamp"
}
slm_environment || exit 1
