# Sourced by launch/quickstart.sh and tests/run.sh, from the project's root: a virtual environment
# with everything installed.
#
# Uses the active environment when there is one, else .venv, which is made with $PYTHON or, without
# one, with the newest Python from 3.10 to 3.13 on PATH. Installs again whenever a file that says
# what is installed has changed. Leaves the environment's bin folder first on PATH.

# slm_fits PYTHON: whether it starts and has a version that everything needed is built for.
slm_fits() {
    "$1" -c 'import sys; sys.exit(not (3, 10) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null
}

slm_python() {
    local candidate without_venv=
    if [ -n "${PYTHON:-}" ] && ! slm_fits "$PYTHON"; then
        echo "PYTHON=$PYTHON: cannot be started, or is not Python 3.10, 3.11, 3.12 or 3.13" >&2
        return 1
    fi
    for candidate in ${PYTHON:+"$PYTHON"} python3.13 python3.12 python3.11 python3.10 python3 python; do
        slm_fits "$candidate" || continue
        # Debian and Ubuntu leave these two out of their python3 package.
        if "$candidate" -c 'import ensurepip, venv' 2>/dev/null; then
            echo "$candidate"
            return
        fi
        without_venv=${without_venv:-$candidate}
    done
    if [ -n "$without_venv" ]; then
        echo "$without_venv cannot make a virtual environment: install its module venv (Debian and Ubuntu: apt install python3-venv)" >&2
    else
        echo "Python 3.10, 3.11, 3.12 or 3.13 is needed and was not found: install it (Debian and Ubuntu: apt install python3 python3-venv; Fedora: dnf install python3.13), or set PYTHON=/path/to/python3.13" >&2
    fi
    return 1
}

slm_environment() {
    local environment=${VIRTUAL_ENV:-$PWD/.venv} python stamp
    if [ "$(uname -s)" != Linux ]; then
        echo "this needs Linux: on macOS and Windows the libraries below it are not supported; WSL 2 or a Linux container will do" >&2
        return 1
    fi
    if [ ! -x "$environment/bin/python" ]; then
        python=$(slm_python) || return 1
        echo "making a virtual environment in $environment with $("$python" --version)" >&2
        "$python" -m venv "$environment" || return 1
    fi
    slm_fits "$environment/bin/python" ||
        { echo "the virtual environment $environment is not Python 3.10, 3.11, 3.12 or 3.13; deactivate it, or make one with python3 -m venv" >&2; return 1; }
    export PATH="$environment/bin:$PATH" VIRTUAL_ENV="$environment"
    stamp="$(cat requirements.txt constraints.txt requirements/*.txt pyproject.toml setup.py megatron_slm/__init__.py | sha256sum) $PWD"
    [ "$(cat "$environment/.megatron_slm_stamp" 2>/dev/null)" != "$stamp" ] || return 0
    echo "installing requirements.txt (a few minutes the first time)" >&2
    "$environment/bin/python" -m pip install --quiet --disable-pip-version-check -r requirements.txt &&
        "$environment/bin/python" -m pip install --quiet --disable-pip-version-check --no-deps --editable . &&
        echo "$stamp" >"$environment/.megatron_slm_stamp"
}
slm_environment || exit 1
