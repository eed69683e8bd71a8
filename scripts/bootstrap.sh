#!/usr/bin/env bash
# Makes .venv ready: scripts/bootstrap.sh [extra ...]      (extras of pyproject.toml; default: test)
#
#   PYTHON             the interpreter to use (default: python3.11, python3.12 or python3, the first that serves)
#   STEER_TORCH_INDEX  address of a package index with CPU builds of torch (see below)
#
# Without a usable GPU, torch is the version pinned in constraints.txt, in a CPU build where pip can get one. With
# a GPU and an interpreter whose own torch is new enough and drives it, that torch is used and nothing replaces it.
# A second run does nothing until pyproject.toml, constraints.txt, this file or the interpreter changes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
ROOT=$PWD
VENV=$ROOT/.venv
PYTHONS=(python3.11 python3.12 python3)
GPU_PYTHONS=(python3 python python3.12 python3.11)
[ -z "${PYTHON:-}" ] || { PYTHONS=("$PYTHON"); GPU_PYTHONS=("$PYTHON"); }
EXTRAS=("${@:-test}")

say() { echo "bootstrap: $*"; }
die() { echo "bootstrap: error: $*" >&2; exit 1; }
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }
pinned() { sed -n "s/^$1==//p" constraints.txt; }

# Prints why this interpreter cannot serve, and nothing if it can.
python_flaw() {
    command -v "$1" >/dev/null || { echo "not found"; return; }
    "$1" - <<'PY' 2>/dev/null || echo "does not run"
import importlib.util, os, sys, sysconfig
if sys.version_info < (3, 11):
    print("is Python %d.%d, and 3.11 or newer is needed" % sys.version_info[:2])
elif not (importlib.util.find_spec("venv") and importlib.util.find_spec("ensurepip")):
    print("has no venv or ensurepip module (Debian: python3-venv)")
elif not os.path.exists(os.path.join(sysconfig.get_path("include"), "Python.h")):
    print("has no Python.h, which torch.compile builds against (Debian: python3-dev)")
PY
}

choose_python() {
    local candidate flaw flaws=""
    for candidate in "${PYTHONS[@]}"; do
        flaw=$(python_flaw "$candidate")
        [ -n "$flaw" ] || { command -v "$candidate"; return; }
        flaws+="; $candidate: $flaw"
    done
    die "no usable Python${flaws}. Install Python 3.11, or name one: make PYTHON=/path/to/python3.11 ..."
}

# Prints the first interpreter whose own torch is at least 2.11 and drives a GPU.
choose_gpu_python() {
    local candidate
    nvidia-smi -L >/dev/null 2>&1 || return 0
    for candidate in "${GPU_PYTHONS[@]}"; do
        [ -z "$(python_flaw "$candidate")" ] || continue
        "$candidate" - 2>/dev/null <<'PY' || continue
import sys, torch
new_enough = tuple(int(part) for part in torch.__version__.split(".")[:2]) >= (2, 11)
sys.exit(not (new_enough and torch.version.cuda and torch.cuda.is_available()))
PY
        command -v "$candidate"
        return
    done
}

create_venv() {
    local python gpu_python
    gpu_python=$(choose_gpu_python)
    python=${gpu_python:-$(choose_python)}
    say "creating .venv with $python ($("$python" -V))"
    rm -rf "$VENV"
    if [ -n "$gpu_python" ]; then
        say "found a GPU and a torch that drives it: .venv sees the packages of $python"
        "$python" -m venv --system-site-packages "$VENV"
    else
        "$python" -m venv "$VENV"
    fi
    echo "$VENV_KEY" >"$VENV/bootstrap.venv"
}

# constraints.txt, less the pins of what the interpreter of a --system-site-packages .venv brings itself.
write_constraints() {
    "$VENV/bin/python" - constraints.txt >"$VENV/constraints.txt" <<'PY'
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
shared = "include-system-site-packages = true" in Path(sys.prefix, "pyvenv.cfg").read_text()
for line in Path(sys.argv[1]).read_text().splitlines():
    name = line.partition("==")[0]
    try:
        found = version(name) if shared and line[:1] not in ("", "#") else None
    except PackageNotFoundError:
        found = None
    if found is None:
        print(line)
    elif name in ("torch", "triton"):
        print(f"{name}=={found}")
PY
}

# Does pip, as this machine sets it up, answer "torch==$1" with a build that brings CUDA libraries?
resolves_to_cuda() {
    local report=$VENV/torch.json
    pip install --quiet --dry-run --ignore-installed --no-deps --report "$report" "torch==$1" ||
        die "pip finds no torch $1 here"
    "$VENV/bin/python" - "$report" <<'PY'
import json, sys
from pip._vendor.packaging.requirements import Requirement
needs = json.load(open(sys.argv[1]))["install"][0]["metadata"].get("requires_dist", [])
found = [need for need in map(Requirement, needs) if need.name.startswith(("nvidia-", "cuda-"))]
sys.exit(not any(need.marker is None or need.marker.evaluate({"extra": ""}) for need in found))
PY
}

install_torch() {
    local version index=()
    version=$(pinned torch)
    if "$VENV/bin/python" -c 'import importlib.metadata as m; m.version("torch")' 2>/dev/null; then
        say "torch $("$VENV/bin/python" -c 'import importlib.metadata as m; print(m.version("torch"))') is there"
        return
    fi
    # A CPU build is numbered 2.13.0+cpu, which pip prefers over 2.13.0, so the index need only be an extra one.
    if [ -n "${STEER_TORCH_INDEX:-}" ]; then
        index=(--extra-index-url "$STEER_TORCH_INDEX")
        say "installing torch $version, with STEER_TORCH_INDEX as an extra index"
    elif ! resolves_to_cuda "$version"; then
        say "installing torch $version (pip resolves it to a CPU build)"
    elif nvidia-smi -L >/dev/null 2>&1; then
        say "installing torch $version (a CUDA build, for the GPU here)"
    else
        say "installing torch $version: a CUDA build, several GB, since pip resolves it to no other; it runs on the CPU."
        say "for the small CPU build, set STEER_TORCH_INDEX to the CPU index that PyTorch's install page names"
    fi
    pip install --quiet "${index[@]}" -c "$VENV/constraints.txt" "torch==$version"
}

extras_key() {
    "$VENV/bin/python" - "$1" pyproject.toml constraints.txt scripts/bootstrap.sh <<'PY'
import hashlib, sys
digest = hashlib.sha256(f"{sys.argv[1]} {sys.version}".encode())
for path in sys.argv[2:]:
    digest.update(open(path, "rb").read())
print(digest.hexdigest())
PY
}

install_extra() {
    local key stamp=$VENV/bootstrap.$1
    key=$(extras_key "$1")
    if [ "$(cat "$stamp" 2>/dev/null)" = "$key" ]; then
        say ".venv is ready for '$1'"
        return
    fi
    write_constraints
    install_torch
    say "installing the pinned packages of '$1' and this checkout (editable)"
    pip install --quiet -c "$VENV/constraints.txt" "setuptools>=77"
    pip install --quiet --no-build-isolation -c "$VENV/constraints.txt" -e ".[$1]"
    echo "$key" >"$stamp"
    say ".venv is ready for '$1' after $SECONDS s"
}

[ -n "$(command -v "${CXX:-g++}" || command -v clang++)" ] ||
    die "torch.compile needs a C++ compiler, and neither ${CXX:-g++} nor clang++ was found"

VENV_KEY="$ROOT ${PYTHON:-}" # a moved checkout or another PYTHON makes a new environment
if [ "$(cat "$VENV/bootstrap.venv" 2>/dev/null)" != "$VENV_KEY" ] || ! "$VENV/bin/python" -c "" 2>/dev/null; then
    create_venv
fi
for extra in "${EXTRAS[@]}"; do
    install_extra "$extra"
done
