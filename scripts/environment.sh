# Sets up the checkout's own virtual environment. Sourced by scripts/demo and scripts/test:
#
#     . "$root/scripts/environment.sh"
#     prepare_environment train        # the extra of pyproject.toml that is needed
#
# Everything stays in $root/.venv. Nothing is installed that is there already.

cpu_index=https://download.pytorch.org/whl/cpu

say() { printf '%s\n' "$*"; }

find_python() {
    for name in ${PYTHON:-} python3.13 python3.12 python3.11 python3 python; do
        if command -v "$name" >/dev/null 2>&1 &&
            "$name" -c 'import sys, venv, ensurepip; sys.exit(not (3, 11) <= sys.version_info < (3, 15))' 2>/dev/null; then
            command -v "$name"
            return
        fi
    done
    say "This needs Python 3.11 to 3.14 with venv (on Debian and Ubuntu: apt install python3-venv);" \
        "install it, or say where it is: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

pip_install() {
    "$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
        --constraint "$root/constraints.txt" "$@"
}

install() {
    # uv where it is there and finds everything, pip otherwise (pip alone reads pip's configuration).
    if command -v uv >/dev/null 2>&1 &&
        uv pip install --quiet --python "$root/.venv/bin/python" --constraint "$root/constraints.txt" "$@"; then
        return
    fi
    pip_install "$@"
}

answers() {
    # A deadline for all of it: the time-out of urlopen does not hold for looking up the name.
    "$root/.venv/bin/python" - "$1" <<'PYTHON' 2>/dev/null
import os, sys, threading, urllib.request
deadline = threading.Timer(5, os._exit, [1])
deadline.daemon = True
deadline.start()
urllib.request.urlopen(sys.argv[1], timeout=5).read(1)
PYTHON
}

refuse_cuda() {
    # What would be installed, going by metadata alone: nothing large is downloaded for that.
    report=$("$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
        --dry-run --ignore-installed --report - "$@")
    if printf '%s' "$report" | "$root/.venv/bin/python" -c '
import json, sys
names = [each["metadata"]["name"].lower() for each in json.load(sys.stdin)["install"]]
sys.exit(not any(name.startswith(("nvidia-", "cuda-")) for name in names))'; then
        say "The package index in use has only a CUDA build of torch, several gigabytes, and PyTorch's" \
            "index of CPU builds ($cpu_index) does not serve this machine. Make it reachable, or ask" \
            "for the CUDA build: WSFED_CUDA=1 $0" >&2
        exit 1
    fi
}

install_torch() {
    version=$(sed -n 's/^torch==//p' "$root/constraints.txt")
    if "$root/.venv/bin/python" -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '$version')" 2>/dev/null; then
        return
    fi
    # With pip, not uv: only pip looks where this machine's configuration says wheels are.
    set --
    if [ -n "${WSFED_CUDA:-}" ]; then
        say "  torch $version from the configured index"
    elif answers "$cpu_index/torch/"; then
        say "  torch $version from PyTorch's CPU index"
        # macOS builds are for the CPU anyway and have no +cpu in their version.
        pip_install --extra-index-url "$cpu_index" "torch==$version+cpu" 2>/dev/null && return
        set -- --extra-index-url "$cpu_index"
    else
        say "  torch $version from the configured index (PyTorch's CPU index does not answer)"
    fi
    [ -n "${WSFED_CUDA:-}" ] || refuse_cuda "$@" "torch==$version"
    pip_install "$@" "torch==$version"
}

environment_is_here() {
    # A copy of a checkout brings an environment whose programs would run the original.
    [ -x "$root/.venv/bin/python" ] && grep -qF "$root/.venv/bin/" "$root/.venv/bin/pip" 2>/dev/null &&
        "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1
}

prepare_environment() {
    extra=$1
    stamp="$root/.venv/.ready-$extra"
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    rebuild=
    environment_is_here || rebuild=yes
    if [ -z "$rebuild" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    begun=$(date +%s)
    say "Setting up .venv (the first time a minute or two, most of it torch)"
    if [ -n "$rebuild" ]; then
        python=$(find_python) || exit 1
        "$python" -m venv --clear "$root/.venv"
    fi
    install_torch
    install --editable "$root[$extra]"
    printf '%s' "$wanted" >"$stamp"
    say "  ready after $(($(date +%s) - begun)) s"
}
