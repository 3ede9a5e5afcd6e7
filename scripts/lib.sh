# shellcheck shell=bash
# Shared by the scripts in this folder: the environment every command runs in, and the virtual environment.
#
#   FEDSIM_VENV    where the virtual environment lies      (default: .venv in the checkout)
#   FEDSIM_PYTHON  the Python that makes it, 3.11 or newer (default: python3, else python3.13, 3.12, 3.11)

ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd -P)
VENV=${FEDSIM_VENV:-$ROOT/.venv}
[[ $VENV == /* ]] || VENV=$PWD/$VENV
# Every extra. CI installs all of them, so that no test is skipped for want of a library.
# shellcheck disable=SC2034
EVERYTHING=all,dev

# Nothing calls home, and nothing is fetched from a hub: whatever runs, runs without a network.
export FLWR_TELEMETRY_ENABLED=0 FLWR_DISABLE_UPDATE_CHECK=1 FLWR_DISABLE_RUNTIME_DEPENDENCY_INSTALLATION=1
export RAY_USAGE_STATS_ENABLED=0 HF_HUB_OFFLINE=1 HF_HUB_DISABLE_TELEMETRY=1 MLFLOW_DISABLE_TELEMETRY=true DO_NOT_TRACK=1
export PIP_DISABLE_PIP_VERSION_CHECK=1 MPLBACKEND=${MPLBACKEND:-Agg}

say() { printf '%s\n' "$*" >&2; }
die() { say "error: $*"; exit 1; }

find_python() {
    local python
    for python in "${FEDSIM_PYTHON:-python3}" python3.13 python3.12 python3.11; do
        if "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null; then
            command -v "$python"
            return
        fi
        # A Python that was asked for by name is taken or refused, never replaced.
        [[ -z ${FEDSIM_PYTHON:-} ]] || break
    done
    python=${FEDSIM_PYTHON:-python3}
    die "fedsim needs Python 3.11 or newer; $python is" \
        "$(if command -v "$python" >/dev/null; then "$python" --version 2>&1; else echo "not there"; fi)." \
        "Install one, or name it: FEDSIM_PYTHON=/path/to/python3.11 $0"
}

# What an installation depends on: when any of it changes, pip looks again.
fingerprint() {
    { printf '%s\n' "$ROOT" "$1"; cat "$ROOT/pyproject.toml" "$ROOT/constraints.txt"; } | cksum
}

# Usable: made for this path (scripts carry it), not left half-made, with a pip and a Python new enough.
venv_is_sound() {
    [[ ! -e $VENV/.installing ]] && grep -qsF "$VENV" "$VENV/bin/activate" &&
        "$VENV/bin/python" -c 'import pip, sys; sys.exit(sys.version_info < (3, 11))' 2>/dev/null
}

make_venv() {
    local python
    python=$(find_python) || return
    if [[ -e $VENV ]]; then
        [[ -e $VENV/pyvenv.cfg || $VENV == "$ROOT/.venv" || -z $(ls -A "$VENV") ]] ||
            die "FEDSIM_VENV=$VENV exists and is no virtual environment; name another folder"
        say "$VENV is unusable or was left half-made: making it anew"
        rm -rf "$VENV"
    fi
    "$python" -m venv "$VENV"
}

# One installer at a time: a second one waits here, then finds the work done.
install() {
    local extras=$1 stamp=$VENV/.installed-$1
    if command -v flock >/dev/null; then flock 9; fi
    venv_is_sound || make_venv || return
    [[ $(cat "$stamp" 2>/dev/null) != "$(fingerprint "$extras")" ]] || return 0

    say "installing fedsim[$extras] into $VENV (some minutes the first time)"
    local pip=("$VENV/bin/python" -m pip install -qq --no-input -c "$ROOT/constraints.txt")
    # The build tools are pinned like the rest, hence no isolated build with whatever is newest.
    touch "$VENV/.installing"
    if ! { "${pip[@]}" hatchling editables && "${pip[@]}" --no-build-isolation -e "${ROOT}[$extras]"; }; then
        die "pip could not install fedsim[$extras]; the lines above say why"
    fi
    fingerprint "$extras" >"$stamp"
    rm "$VENV/.installing"
}

# ensure_venv EXTRAS: the virtual environment with fedsim and these extras, as constraints.txt pins them.
ensure_venv() {
    mkdir -p "$(dirname "$VENV")"
    (install "$1") 9>"$VENV.lock" || exit 1
}
