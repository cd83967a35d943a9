#!/usr/bin/env bash
# Sets up everything and runs the checks and the tests: bash tests/run.sh [pytest options]
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh requirements.txt tests/requirements.txt
ruff format --check .
ruff check .
exec python -m pytest "$@"
