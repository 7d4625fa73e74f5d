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
    say "This needs Python 3.11 or newer with venv; install it, or say where it is: PYTHON=/path/to/python3.11 $0" >&2
    return 1
}

install() {
    # uv where it is there, pip otherwise; what was asked for is in the arguments.
    if command -v uv >/dev/null 2>&1; then
        uv pip install --quiet --python "$root/.venv/bin/python" --constraint "$root/constraints.txt" "$@"
    else
        "$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
            --constraint "$root/constraints.txt" "$@"
    fi
}

install_torch() {
    version=$(sed -n 's/^torch==//p' "$root/constraints.txt")
    if "$root/.venv/bin/python" -c "import sys, importlib.metadata as m; sys.exit(m.version('torch').split('+')[0] != '$version')" 2>/dev/null; then
        return
    fi
    # PyPI's wheels for Linux bring CUDA, several gigabytes; PyTorch's own index has CPU builds.
    if "$root/.venv/bin/python" - "$cpu_index/torch/" <<'PYTHON' 2>/dev/null
import sys, urllib.request
urllib.request.urlopen(sys.argv[1], timeout=4).read(1)
PYTHON
    then
        say "  torch $version from PyTorch's CPU index"
        "$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
            --extra-index-url "$cpu_index" "torch==$version+cpu" 2>/dev/null ||
            "$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check \
                --extra-index-url "$cpu_index" "torch==$version"
    else
        # With pip, not uv: only pip looks where this machine's configuration says wheels are.
        say "  torch $version from the configured index (PyTorch's CPU index does not answer)"
        "$root/.venv/bin/python" -m pip install --quiet --quiet --disable-pip-version-check "torch==$version"
    fi
}

prepare_environment() {
    extra=$1
    stamp="$root/.venv/.ready-$extra"
    wanted=$(cat "$root/pyproject.toml" "$root/constraints.txt" | cksum)
    if [ -x "$root/.venv/bin/python" ] && [ "$(cat "$stamp" 2>/dev/null)" = "$wanted" ]; then
        return
    fi
    begun=$(date +%s)
    say "Setting up .venv (the first time a minute or two, most of it torch)"
    if ! [ -x "$root/.venv/bin/python" ] || ! "$root/.venv/bin/python" -m pip --version >/dev/null 2>&1; then
        python=$(find_python) || exit 1
        "$python" -m venv --clear "$root/.venv"
    fi
    install_torch
    install --editable "$root[$extra]"
    printf '%s' "$wanted" >"$stamp"
    say "  ready after $(($(date +%s) - begun)) s"
}
