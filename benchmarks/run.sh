#!/usr/bin/env bash
# Sets up a virtual environment in .venv and runs the benchmarks; arguments as `python -m benchmarks`.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/venv.sh
install '.[bench]'
export HF_HUB_OFFLINE=1
# One thread: what is compared is work, not how well it is spread over cores others use as well.
export OMP_NUM_THREADS=1
"$PYTHON" -m benchmarks "$@"
