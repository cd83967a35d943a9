#!/usr/bin/env bash
# Sets up the environment and runs all checks and tests: bash tests/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh requirements.txt tests/requirements.txt
ruff format --check .
ruff check .
codespell
mypy
exec python -m pytest "$@"
