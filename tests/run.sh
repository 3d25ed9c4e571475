#!/usr/bin/env bash
# Sets up what is needed and runs the tests. Usage: bash tests/run.sh [pytest arguments], e.g. bash tests/run.sh tests/objective -x
# All tests run in two processes, those with an SGLang server in one of them; tests that are named, -x or -n: in one.
# They run on the CPUs. Those that need a GPU, on a machine that has one: DEVICE=cuda bash tests/run.sh -m gpu
set -euo pipefail
cd "$(dirname "$0")/.."
if [[ -z ${DEVICE:-} ]]; then
  export DEVICE=cpu
  if command -v nvidia-smi >/dev/null; then
    echo "on the CPUs of this machine; the tests of GPUs: DEVICE=cuda bash tests/run.sh -m gpu"
  fi
fi
bash tools/setup_environment.sh
export OMP_NUM_THREADS=1
PROCESSES=(-n 2 --dist loadscope --no-loadscope-reorder)
for argument in "$@"; do
  if [[ -e ${argument%%::*} || $argument == -[xn]* ]]; then PROCESSES=(); fi
done
exec .venv/bin/python -m pytest "${PROCESSES[@]}" "$@"
