#!/usr/bin/env bash
# Sets up a virtual environment in .venv and runs the main job on a real model; leaves out/.
set -euo pipefail
cd "$(dirname "$0")/.."
source .ci/venv.sh
install '.[examples]'
export HF_HUB_OFFLINE=1
"$PYTHON" examples/minilm.py out
