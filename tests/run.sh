#!/usr/bin/env bash
# Sets up the environment and runs all checks and tests, three test files at a time: bash tests/run.sh [pytest options]
# With options of pytest, e.g. a file, one at a time.
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh requirements.txt tests/requirements.txt
ruff format --check .
ruff check .
codespell

# The type checker runs next to the tests, which leave a core idle now and then; its report comes last.
report="$(mktemp)"
mypy >"$report" 2>&1 &
checker=$!
trap 'kill "$checker" 2>/dev/null || true; rm -f "$report"' EXIT
[ $# -gt 0 ] || set -- --numprocesses=3 --dist=loadfile --no-loadscope-reorder  # tests/conftest.py orders them
tests=0 types=0
python -m pytest "$@" || tests=$?
wait "$checker" || types=$?
echo "mypy:"
cat "$report"
[ "$tests" = 0 ] || exit "$tests"
exit "$types"
