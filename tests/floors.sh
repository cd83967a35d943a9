#!/usr/bin/env bash
# Runs tests with the lowest version of every requirement that the files state: bash tests/floors.sh [pytest options]
# Without options: the parts that third-party APIs reach most, two test files at a time.
# PYTHON chooses the interpreter (3.11 by default).
set -euo pipefail
cd "$(dirname "$0")/.."
venv=.venv-floors
[ -x "$venv/bin/uv" ] || { "${PYTHON:-python3.11}" -m venv "$venv" && "$venv/bin/python" -m pip install -q uv; }
VIRTUAL_ENV="$PWD/$venv" "$venv/bin/uv" pip install -q --resolution lowest-direct -r requirements.txt -r tests/requirements.txt
export PATH="$PWD/$venv/bin:$PATH" PYTHONPATH="$PWD"
[ $# -gt 0 ] || set -- --numprocesses=2 --dist=loadfile \
  tests/config tests/processing tests/models tests/data tests/weights tests/golden tests/train tests/generate
exec python -m pytest "$@"
