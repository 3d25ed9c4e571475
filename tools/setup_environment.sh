#!/usr/bin/env bash
# Makes the two Python environments of the project, or finds them made:
#   .venv          conversion, training, tools, tests        (requirements.txt, requirements-test.txt)
#   .venv-sglang   the SGLang server, reached over HTTP only (requirements-sglang.txt, or requirements-sglang-cpu.txt without a GPU)
# Usage: bash tools/setup_environment.sh [--without-sglang]
# PYTHON names the interpreter to use (default python3, version 3.11). Run again after a change of a requirements file; otherwise it
# returns at once. On a machine without an NVIDIA GPU a CPU build of torch is installed: pip's own choice if that is one, else the
# build from PyTorch's CPU index.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=torch==2.13.0
PYTHON=${PYTHON:-python3}
WITH_SGLANG=1
for argument in "$@"; do
  case $argument in
    --without-sglang) WITH_SGLANG=0 ;;
    -h | --help) sed -n '2,9s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument $argument: see --help" >&2; exit 2 ;;
  esac
done

version=$("$PYTHON" -c 'import sys; print("%d.%d" % sys.version_info[:2])') || { echo "error: $PYTHON does not run: set PYTHON to a Python 3.11" >&2; exit 2; }
[[ $version == 3.11 ]] || { echo "error: $PYTHON is Python $version: the pinned packages need 3.11; set PYTHON to one" >&2; exit 2; }
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then DEVICE=cuda; else DEVICE=cpu; fi

install_torch() {  # VENV
  local index=()
  if [[ $DEVICE == cpu ]]; then
    # only pip's answer is looked at here; nothing is installed
    if ! "$1/bin/pip" install -q --dry-run --no-deps --report - "$TORCH" 2>/dev/null | grep -qE '(\+|%2B)cpu'; then
      index=(--index-url https://download.pytorch.org/whl/cpu)
    fi
  fi
  "$1/bin/pip" install -q "${index[@]}" "$TORCH"
}

make_environment() {  # VENV, requirements files and pip options
  local venv=$1 stamp started=$SECONDS
  shift
  local files=()
  for argument in "$@"; do [[ -f $argument ]] && files+=("$argument"); done
  stamp="$DEVICE $TORCH $version $(cat "${files[@]}" | sha256sum)"
  if [[ -f $venv/complete && $(<"$venv/complete") == "$stamp" ]]; then return; fi
  echo "== $venv: installing $DEVICE packages (a few minutes; some gigabytes on a GPU machine)"
  [[ -x $venv/bin/pip ]] || "$PYTHON" -m venv "$venv"
  rm -f "$venv/complete"
  install_torch "$venv"
  DS_BUILD_OPS=0 "$venv/bin/pip" install -q "$@"
  echo "$stamp" >"$venv/complete"
  echo "== $venv: ready after $((SECONDS - started)) s"
}

exec 9>.setup.lock  # two commands started together install once
flock 9
make_environment .venv -r requirements.txt -r requirements-test.txt
if [[ $WITH_SGLANG == 1 ]]; then
  if [[ $DEVICE == cpu ]]; then
    make_environment .venv-sglang --no-deps -r requirements-sglang-cpu.txt
  else
    make_environment .venv-sglang -r requirements-sglang.txt
  fi
fi
