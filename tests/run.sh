#!/usr/bin/env bash
# Sets up a virtual environment in .venv and passes the tests.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/venv.sh
install '.[dev]'
export HF_HUB_OFFLINE=1
"$PYTHON" -m pytest "$@"
