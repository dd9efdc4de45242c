#!/usr/bin/env bash
# Trains IMLE and MAE from scratch with the same data, seeds, steps and evaluation, and measures the effect of codes.
# After an interruption, the same command goes on. Flags on the command line apply to all runs and override the
# flags of digits.sh, but not --seed, --uid, --ignore_z and --mae_loss_weight. With your data:
#   OUT=runs/mine bash scripts/figure.sh --data_tr DATA/train --data_val DATA/val --input_size 32
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
. scripts/digits.sh
: "${OUT:=runs/figure}" "${SEEDS:=0 1 2}"

for seed in $SEEDS; do
    echo "--seed $seed --ignore_z 1 --uid mae-$seed"
    echo "--seed $seed --uid imle-$seed"
    echo "--seed $seed --mae_loss_weight 0 --uid alone-$seed"
done | bash scripts/train_many.sh $DIGITS "$@" --save_folder "$OUT"

set -- "$OUT" --names imle=IMLE "alone=IMLE, --mae_loss_weight 0" mae=MAE
python scripts/figure.py "$@" --out "$OUT/figure.png"
python scripts/what_codes_add.py "$@" --out "$OUT/codes.png"
echo "Pictures: $OUT/figure.png, $OUT/codes.png, $OUT/codes_classes.png"
