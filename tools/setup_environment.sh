#!/usr/bin/env bash
# Makes the two Python environments of the project, or finds them made:
#   .venv          conversion, training, tools, tests        (requirements.txt, requirements-test.txt, requirements-dev.txt)
#   .venv-sglang   the SGLang server, reached over HTTP only (requirements-sglang.txt, or requirements-sglang-cpu.txt without a GPU)
# Usage: bash tools/setup_environment.sh [--without-sglang]
# Python 3.11 or 3.12: the one that PYTHON names, else that of .venv, python3, python3.12 or python3.11, the first with such a version.
# The project itself is installed into .venv as it lies here (pip install -e), so that .venv/bin/papo-convert works from anywhere.
# Run again after a change of a requirements file; otherwise it returns at once. On a machine without an NVIDIA GPU a CPU build of
# torch is installed: pip's own choice if that is one, else the build from PyTorch's CPU index; where that cannot be
# reached, pip's own choice after all.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=torch==2.13.0
WITH_SGLANG=1
for argument in "$@"; do
  case $argument in
    --without-sglang) WITH_SGLANG=0 ;;
    -h | --help) sed -n '2,10s/^# \{0,1\}//p' "$0"; exit 0 ;;
    *) echo "error: unknown argument $argument: see --help" >&2; exit 2 ;;
  esac
done

version_of() { "$1" -c 'import sys; print("%d.%d" % sys.version_info[:2])' 2>/dev/null || true; } # empty: it does not run

choose_python() { # sets PYTHON and VERSION
  local candidates=(.venv/bin/python python3 python3.12 python3.11) refused=()
  [[ -z ${PYTHON:-} ]] || candidates=("$PYTHON")
  for PYTHON in "${candidates[@]}"; do
    VERSION=$(version_of "$PYTHON")
    [[ $VERSION != 3.11 && $VERSION != 3.12 ]] || return 0
    [[ -z $VERSION ]] || refused+=("$PYTHON is $VERSION")
  done
  ((${#refused[@]})) || refused=("${candidates[*]} does not run")
  echo "error: needs Python 3.11 or 3.12 ($(IFS=,; echo "${refused[*]}")): name one, e.g. PYTHON=/usr/bin/python3.12" >&2
  exit 2
}
choose_python
if command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1; then DEVICE=cuda; else DEVICE=cpu; fi

install_torch() {  # VENV
  local index=()
  if [[ $DEVICE == cpu ]]; then
    # only pip's answer is looked at here; nothing is installed
    if ! "$1/bin/pip" install -q --dry-run --no-deps --report - "$TORCH" 2>/dev/null | grep -qE '(\+|%2B)cpu'; then
      index=(--index-url https://download.pytorch.org/whl/cpu)
    fi
  fi
  if ((${#index[@]})) && ! "$1/bin/pip" install -q --retries 1 "${index[@]}" "$TORCH"; then
    echo "== $1: PyTorch's CPU index has no $TORCH for us: taking pip's own choice, which is larger and works as well"
    index=()
  fi
  ((${#index[@]})) || "$1/bin/pip" install -q "$TORCH"
}

make_environment() {  # VENV, requirements files and pip options
  local venv=$1 stamp started=$SECONDS
  shift
  local files=()
  for argument in "$@"; do [[ -f $argument ]] && files+=("$argument"); done
  stamp="$DEVICE $TORCH $VERSION $(cat "${files[@]}" | sha256sum)"
  if [[ -f $venv/complete && $(<"$venv/complete") == "$stamp" ]]; then return; fi
  echo "== $venv: installing $DEVICE packages with $PYTHON, Python $VERSION (a few minutes; some gigabytes on a GPU machine)"
  if [[ ! -x $venv/bin/pip || $(version_of "$venv/bin/python") != "$VERSION" ]]; then "$PYTHON" -m venv --clear "$venv"; fi
  rm -f "$venv/complete"
  install_torch "$venv"
  DS_BUILD_OPS=0 "$venv/bin/pip" install -q "$@"
  echo "$stamp" >"$venv/complete"
  echo "== $venv: ready after $((SECONDS - started)) s"
}

exec 9>.setup.lock  # two commands started together install once
flock 9
make_environment .venv -r requirements.txt -r requirements-test.txt -r requirements-dev.txt
INSTALLED=(.venv/lib/python3*/site-packages/megatron_papo-*.dist-info/direct_url.json) # says which checkout it is
if [[ ! .venv/bin/papo-convert -nt pyproject.toml ]] || ! grep -qsF "\"file://$(pwd -P)\"" "${INSTALLED[@]}"; then
  .venv/bin/pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
fi
if [[ $WITH_SGLANG == 1 ]]; then
  if [[ $DEVICE == cpu ]]; then
    make_environment .venv-sglang --no-deps -r requirements-sglang-cpu.txt
  else
    make_environment .venv-sglang -r requirements-sglang.txt
  fi
fi
