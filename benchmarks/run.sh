#!/usr/bin/env bash
# Sets up a virtual environment in .venv and runs the benchmarks; arguments as `python -m benchmarks`.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/venv.sh
install '.[bench]'
export HF_HUB_OFFLINE=1
# One thread: what is compared is work, not how well it is spread over cores others use as well.
export OMP_NUM_THREADS=1
# Freed memory stays with the process: fetching it from the system anew, a page fault at a time, costs
# more than a small kernel, and whom it hits depends on what the heap looks like, not on who asks.
export MALLOC_MMAP_THRESHOLD_=1073741824 MALLOC_TRIM_THRESHOLD_=4294967296
"$PYTHON" -m benchmarks "$@"
