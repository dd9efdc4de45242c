#!/usr/bin/env bash
# Trains many runs, JOBS at a time, with equal shares of the CPU cores: bash scripts/train_many.sh FLAGS < LINES. Each line holds
# further flags of one run and ends with `--uid NAME`. The same command again goes on with each run. On GPUs use JOBS=1; each run
# takes all GPUs unless --gpus names some (networks as small as vit_demo need only one: --gpus 0).
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
