#!/usr/bin/env bash
# Everything in miniature, set-up included, on a laptop without a GPU: bash launch/quickstart.sh
set -euo pipefail
cd "$(dirname "$0")/.."
source launch/setup.sh requirements.txt
exec python stages/tiny/quickstart.py "$@"
