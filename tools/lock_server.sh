#!/usr/bin/env bash
# Writes requirements-sglang-cuda.txt: what requirements-sglang.txt asks for and all that it needs, each at one version, for Linux on
# x86_64 with Python 3.11 and 3.12. Only metadata is downloaded.
# Usage: bash tools/lock_server.sh [FILE]   (versions that FILE, by default requirements-sglang-cuda.txt, has already are kept while they fit)
set -euo pipefail
cd "$(dirname "$0")/.."
[[ " $* " != *" -h "* && " $* " != *" --help "* ]] || { sed -n '2,4s/^# \{0,1\}//p' "$0"; exit 0; }
LOCK=${1:-requirements-sglang-cuda.txt}
UV=(.venv/bin/uv pip compile --no-python-downloads --python-platform x86_64-manylinux_2_34 --annotation-style line --quiet requirements-sglang.txt)
HEADING="# The SGLang server on GPU machines (.venv-sglang-cuda): requirements-sglang.txt and all that it needs, for x86_64 with Python 3.11 or
# 3.12; behind each package which one needs it. Written by make lock (tools/lock_server.sh): change requirements-sglang.txt instead."

NEW=$(mktemp -d)
trap 'rm -rf "$NEW"' EXIT
[[ ! -f $LOCK ]] || cp "$LOCK" "$NEW/3.11"
"${UV[@]}" --no-header --python-version 3.11 --output-file "$NEW/3.11" >/dev/null
"${UV[@]}" --no-header --python-version 3.12 --constraint "$NEW/3.11" --output-file "$NEW/3.12" >/dev/null
pins() { sed 's/ *#.*//; /^$/d' "$1"; }
if ! diff <(pins "$NEW/3.11") <(pins "$NEW/3.12") >&2; then
  echo "error: Python 3.12 needs other packages than Python 3.11 (above): constrain them in requirements-sglang.txt" >&2
  exit 2
fi
{ echo "$HEADING"; cat "$NEW/3.11"; } >"$LOCK"
