#!/usr/bin/env bash
# Makes .venv-saelens ready: SAELens beside this checkout, for `make test-saelens`.
#
#   PYTHON             the interpreter to use (default: that of .venv, which scripts/bootstrap.sh makes)
#   STEER_TORCH_INDEX  address of a package index with CPU builds of torch (see scripts/bootstrap.sh)
#
# A second run does nothing until the constraints, pyproject.toml, this file or the interpreter changes.
set -euo pipefail

cd "$(dirname "${BASH_SOURCE[0]}")/.."
VENV=$PWD/.venv-saelens
pip() { "$VENV/bin/python" -m pip --disable-pip-version-check --no-input "$@"; }

PYTHON=${PYTHON:-$(.venv/bin/python -c 'import sys; print(sys._base_executable)')}
KEY=$("$PYTHON" -VV; cat constraints.txt constraints-saelens.txt pyproject.toml scripts/bootstrap_saelens.sh | sha256sum)
[ "$(cat "$VENV/bootstrap.key" 2>/dev/null)" != "$KEY" ] || exit 0

echo "bootstrap: creating .venv-saelens with $PYTHON"
rm -rf "$VENV"
"$PYTHON" -m venv "$VENV"
echo "bootstrap: installing sae-lens (about 100 packages)"
pip install --quiet -c constraints.txt "setuptools>=77"
INDEX=()
[ -z "${STEER_TORCH_INDEX:-}" ] || INDEX=(--extra-index-url "$STEER_TORCH_INDEX")
pip install --quiet "${INDEX[@]}" -c constraints.txt -c constraints-saelens.txt -e ".[saelens]"
echo "$KEY" >"$VENV/bootstrap.key"
