#!/usr/bin/env bash
# Runs everything in miniature, including the set-up, on a laptop without a GPU: bash launch/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh requirements.txt
exec python stages/tiny/quickstart.py "$@"
