#!/usr/bin/env bash
# Measures attention, and training steps of the published size with random weights next to the original's procedure, on this
# machine's GPUs, in at most eight minutes.
#   bash benchmarks/gpu.sh [--wheels DIR] [--out DIR] [--minutes M] [--gpus N] [--only WORDS ...] [--all] [--dry-run]
# --wheels names a folder of wheels (gpu_wheels.sh); those of packages that are not installed here are used for
# this run only. PYTHON chooses the interpreter; by default it is the first with torch that sees a GPU. Exit code 0:
# everything ran and agreed; 1: something did not.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
wheels=""
options=()
while [ $# -gt 0 ]; do
  case "$1" in
    --wheels) wheels="${2:?--wheels needs a folder}"; shift 2 ;;
    *) options+=("$1"); shift ;;
  esac
done

python="" gpus=0
for candidate in "${PYTHON:-"$root/.venv/bin/python"}" ${PYTHON:-python3 python}; do
  [ "$candidate" != "$python" ] || continue
  found="$("$candidate" -c 'import torch; print(torch.cuda.device_count())' 2>/dev/null)" || continue
  if [ -z "$python" ] || [ "$found" -gt "$gpus" ]; then python="$candidate" gpus="$found"; fi
  [ "$gpus" -eq 0 ] || break
done
if [ -z "$python" ]; then
  echo "error: no python here has torch; name one with PYTHON=/path/to/python" >&2
  exit 2
fi
echo "$python, $gpus GPU(s)"

export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
if [ -n "$wheels" ]; then
  site="$(mktemp -d)"
  trap 'rm -rf "$site"' EXIT
  "$python" "$root/benchmarks/gpu/install.py" "$wheels" "$site"
  export PYTHONPATH="$PYTHONPATH:$site"
fi
"$python" -m benchmarks.gpu --gpus "$gpus" ${options[@]+"${options[@]}"}
