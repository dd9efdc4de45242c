#!/usr/bin/env bash
# Trains many runs, JOBS at a time, each on its share of the cores: bash scripts/train_many.sh FLAGS < LINES, where a line is
# further flags of one run and ends with `--uid NAME`. The same command again goes on where each run stood. On GPUs: JOBS=1,
# and --gpus 0 for networks as small as vit_demo, else each run takes all.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${JOBS:=2}"
lines=$(cat)
[ -n "$lines" ] || { echo "train_many.sh: error: no runs" >&2; exit 2; }
if [ -z "${OMP_NUM_THREADS:-}" ] && [ "$JOBS" -gt 1 ]; then
    OMP_NUM_THREADS=$(python -c "import os
cores = len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity') else os.cpu_count()
print(max(1, cores // $JOBS))")
    export OMP_NUM_THREADS
fi
printf '%s\n' "$lines" | xargs -P "$JOBS" -L 1 bash -c '
    set -o pipefail
    python TrainIMLE.py "$@" 2>&1 | while IFS= read -r line; do echo "${*: -1}: $line"; done' train "$@"
