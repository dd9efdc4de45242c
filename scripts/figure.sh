#!/usr/bin/env bash
# Trains IMLE (codes behind the last encoder block, and more codes behind the last decoder block) and MAE from scratch with the
# same data, seeds, steps and evaluation, and measures the effect of codes. After an interruption, the same command goes on.
# Flags on the command line apply to all runs and override the flags of digits.sh, but not those of the three settings. With
# your data (relative paths start at the repository):
#   OUT=runs/mine bash scripts/figure.sh --data_tr DATA/train --data_val DATA/val --input_size 32
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
. scripts/digits.sh
: "${OUT:=runs/figure}" "${SEEDS:=0 1 2}"

for seed in $SEEDS; do
    echo "--seed $seed --ignore_z 1 --uid mae-$seed"
    echo "--seed $seed --uid imle-$seed"
    echo "--seed $seed --ip_spec 5 adain --ns 64 --uid decoder-$seed"
done | bash scripts/train_many.sh $DIGITS "$@" --save_folder "$OUT"

set -- "$OUT" --names imle=IMLE "decoder=IMLE, last decoder block, 64 codes" mae=MAE
python scripts/figure.py "$@" --out "$OUT/figure.png"
python scripts/what_codes_add.py "$@" --out "$OUT/codes.png"
echo "Pictures: $OUT/figure.png, $OUT/codes.png, $OUT/codes_classes.png"
