#!/usr/bin/env bash
# Sets up a virtual environment in .venv and passes the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/venv.sh
install '.[dev]'
export HF_HUB_OFFLINE=1
# One process a core, each with one thread: the tests' tensors are too small for more.
export OMP_NUM_THREADS=1
"$PYTHON" -m pytest -n auto --maxprocesses 4 "$@"
