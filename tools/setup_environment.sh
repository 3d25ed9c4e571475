#!/usr/bin/env bash
# Makes the Python environments of the project, or finds them made:
#   .venv               conversion, training, tools, tests            (requirements.txt, requirements-test.txt, requirements-dev.txt)
#   .venv-sglang        the SGLang server on CPUs, reached over HTTP only                (requirements-sglang-cpu.txt)
#   .venv-sglang-cuda   the SGLang server on GPUs                                        (requirements-sglang-cuda.txt)
# Usage: [DEVICE=cuda|cpu] bash tools/setup_environment.sh [--without-sglang]
# DEVICE says what for; without it, GPUs where nvidia-smi lists some. So DEVICE=cuda prepares a login node without GPUs, DEVICE=cpu
# leaves GPUs alone. A .venv made for CPUs is made again for GPUs; one made for GPUs serves both, as torch for CUDA computes on CPUs, too.
# Python 3.11 or 3.12: the one that PYTHON names, else that of .venv, python3, python3.12 or python3.11, the first with such a version.
# The project itself is installed into .venv as it lies here (pip install -e), so that .venv/bin/papo-convert works from anywhere.
# Run again after a change of a requirements file; otherwise it returns at once. torch is pip's own choice where that is a build for
# the device, else that of PyTorch's index for it; for CPUs pip's own choice does where the index cannot be reached. pip's variables
# hold (PIP_FIND_LINKS, PIP_NO_INDEX, ...): docs/gpu.md says how to install without a network.
set -euo pipefail
cd "$(dirname "$0")/.."

TORCH=torch==2.13.0
CUDA=cu130 # of PyTorch's index for GPUs
WITH_SGLANG=1
for argument in "$@"; do
  case $argument in
    --without-sglang) WITH_SGLANG=0 ;;
    -h | --help) sed -n '2,15s/^# \{0,1\}//p' "$0"; exit 0 ;;
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

has_gpu() { # one that is not hidden
  [[ -n ${CUDA_VISIBLE_DEVICES-all} && ${CUDA_VISIBLE_DEVICES-all} != -1 ]] && command -v nvidia-smi >/dev/null && nvidia-smi -L >/dev/null 2>&1
}

choose_device() { # sets DEVICE
  if [[ -z ${DEVICE:-} ]]; then
    if has_gpu; then DEVICE=cuda; else DEVICE=cpu; fi
  elif [[ $DEVICE != cuda && $DEVICE != cpu ]]; then
    echo "error: DEVICE=$DEVICE: expected cuda or cpu: correct it, or unset DEVICE" >&2
    exit 2
  fi
}

pip_takes_cpu_build() { # VENV: would pip install one? Only its answer is looked at here; nothing is installed
  "$1/bin/pip" install -q --dry-run --no-deps --report - "$TORCH" 2>/dev/null | grep -qE '(\+|%2B)cpu'
}

install_torch() {  # VENV DEVICE
  local index=https://download.pytorch.org/whl
  if [[ $2 == cpu ]] && ! pip_takes_cpu_build "$1"; then
    ! "$1/bin/pip" install -q --retries 1 --index-url "$index/cpu" "$TORCH" || return 0
    echo "== $1: PyTorch's CPU index has no $TORCH for us: taking pip's own choice, which is larger and works as well"
  elif [[ $2 == cuda ]] && pip_takes_cpu_build "$1"; then
    ! "$1/bin/pip" install -q --retries 1 --index-url "$index/$CUDA" "$TORCH+$CUDA" || return 0
    echo "error: pip's own choice of $TORCH is a build for CPUs, and $index/$CUDA has none for us: give pip one for CUDA (PIP_INDEX_URL, PIP_FIND_LINKS), or set DEVICE=cpu" >&2
    exit 2
  fi
  "$1/bin/pip" install -q "$TORCH"
}

CHECKED=0
check_machine() { # once
  ((CHECKED)) || "$PYTHON" -m tools.check_gpu || exit 2
  CHECKED=1
}

make_environment() {  # VENV DEVICE, requirements files and pip options
  local venv=$1 device=$2 made="" stamp started=$SECONDS
  shift 2
  local files=()
  for argument in "$@"; do [[ -f $argument ]] && files+=("$argument"); done
  stamp="$device $TORCH $VERSION $(cat "${files[@]}" | sha256sum)"
  [[ ! -f $venv/complete ]] || read -r made <"$venv/complete"
  [[ $made != "$stamp" ]] || return 0
  [[ $device == cpu ]] || check_machine
  echo "== $venv: installing $device packages with $PYTHON, Python $VERSION (a few minutes; some gigabytes for GPUs)"
  if [[ ${made%% *} != "$device" || ! -x $venv/bin/pip || $(version_of "$venv/bin/python") != "$VERSION" ]]; then
    "$PYTHON" -m venv --clear "$venv"
  fi
  echo "$device incomplete" >"$venv/complete"
  install_torch "$venv" "$device"
  DS_BUILD_OPS=0 "$venv/bin/pip" install -q "$@"
  if [[ $device == cuda ]] && ! "$venv/bin/python" -m tools.check_gpu --torch; then
    rm "$venv/complete" # so that the next attempt begins anew, whatever for
    exit 2
  fi
  echo "$stamp" >"$venv/complete"
  echo "== $venv: ready after $((SECONDS - started)) s"
}

device_of_training() { # a complete .venv for GPUs serves both
  local made=""
  [[ ! -f .venv/complete ]] || read -r made <.venv/complete
  if [[ $made == "cuda $TORCH "* ]]; then echo cuda; else echo "$DEVICE"; fi
}

choose_python
choose_device
exec 9>.setup.lock  # two commands started together install once
flock 9
make_environment .venv "$(device_of_training)" -r requirements.txt -r requirements-test.txt -r requirements-dev.txt
INSTALLED=(.venv/lib/python3*/site-packages/megatron_papo-*.dist-info/direct_url.json) # says which checkout it is
if [[ ! .venv/bin/papo-convert -nt pyproject.toml ]] || ! grep -qsF "\"file://$(pwd -P)\"" "${INSTALLED[@]}"; then
  .venv/bin/pip install -q --no-deps --no-build-isolation --disable-pip-version-check -e .
fi
[[ $WITH_SGLANG == 1 ]] || exit 0
if [[ $DEVICE == cpu ]]; then
  make_environment .venv-sglang cpu --no-deps -r requirements-sglang-cpu.txt
elif [[ $(uname -m) == x86_64 ]]; then
  make_environment .venv-sglang-cuda cuda -r requirements-sglang-cuda.txt
else # the lock file's builds are x86_64's
  make_environment .venv-sglang-cuda cuda -r requirements-sglang.txt
fi
