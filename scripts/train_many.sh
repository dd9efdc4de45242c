#!/usr/bin/env bash
# Trains many runs, JOBS at a time, each on its share of the cores: bash scripts/train_many.sh FLAGS < LINES, where a line is
# further flags of one run and ends with `--uid NAME`. The same command again goes on where each run stood.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${JOBS:=2}"
OMP_NUM_THREADS=$(python -c "import os; print(max(1, os.cpu_count() // $JOBS))")
export OMP_NUM_THREADS
xargs -P "$JOBS" -L 1 bash -c '
    set -o pipefail
    python TrainIMLE.py "$@" 2>&1 | while IFS= read -r line; do echo "${*: -1}: $line"; done' train "$@"
