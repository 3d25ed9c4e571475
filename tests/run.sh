#!/usr/bin/env bash
# Sets up what is needed and runs the tests. Usage: bash tests/run.sh [pytest arguments], e.g. bash tests/run.sh tests/objective -x
set -euo pipefail
cd "$(dirname "$0")/.."
bash tools/setup_environment.sh
export OMP_NUM_THREADS=1
exec .venv/bin/python -m pytest "$@"
