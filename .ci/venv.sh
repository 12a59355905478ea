# Sourced by examples/run.sh, tests/run.sh and .ci/run: a venv of our own, and how to install.
# FXLORA_VENV names another folder; PYTHON3 another interpreter.

VENV=${FXLORA_VENV:-.venv}
if [ ! -x "$VENV/bin/python" ]; then
  base=${PYTHON3:-python3}
  "$base" -c 'import sys; sys.exit(sys.version_info < (3, 10))' || {
    echo "fxlora needs Python 3.10 or newer; $base is $("$base" --version 2>&1)." >&2
    echo "Name another one: PYTHON3=python3.12 $0" >&2
    exit 2
  }
  "$base" -m venv "$VENV" || {
    echo "No venv could be made; on Debian and Ubuntu: apt-get install python3-venv" >&2
    exit 2
  }
fi
PYTHON=$(cd "$VENV/bin" && pwd)/python

install() {
  # torch first and alone: with it in place nothing pulls another build of it.
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt torch
  "$PYTHON" -m pip install --quiet --disable-pip-version-check -c constraints.txt -e "$1"
}
