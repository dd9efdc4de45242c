#!/usr/bin/env bash
# Trains the paper's two runs, IMLE and MAE from scratch on few images of ImageNet, with several seeds on GPUs, and draws their
# figure. After an interruption, the same command goes on. Flags on the command line override; OUT and SEEDS as in figure.sh.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${OUT:=runs/figure_imagenet}" "${SEEDS:=0 1 2}"

for seed in $SEEDS; do
    bash scripts/mae_from_scratch.sh --save_folder "$OUT" "$@" --seed "$seed" --uid "mae-$seed"
    bash scripts/imle_from_scratch.sh --save_folder "$OUT" "$@" --seed "$seed" --uid "imle-$seed"
done
python scripts/figure.py "$OUT" --out "$OUT/figure.png" --names mae=MAE imle=IMLE
