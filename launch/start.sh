#!/usr/bin/env bash
# bash launch/start.sh stageN [options]: "tinygptv-ds train stageN [options]" with this repository's environment
# (launch/stageN.sh calls it). Options of DeepSpeed's launcher and of the stage, in any order.
set -euo pipefail
root="$(cd "$(dirname "$(readlink -f "$0")")/.." && pwd)"
[ -x "$root/.venv/bin/python" ] && export PATH="$root/.venv/bin:$PATH"
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
exec python -P -m tinygptv_ds train "$@"
