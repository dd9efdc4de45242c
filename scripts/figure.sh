#!/usr/bin/env bash
# Trains IMLE and MAE from scratch with the same data, seeds, steps and evaluation, and measures the effect of codes; takes an hour
# on 2 CPU cores. After an interruption, the same command goes on. Flags on the command line apply to all runs and override the
# flags below, but not --seed, --uid, --ignore_z and --mae_loss_weight. With your data:
#   OUT=runs/mine bash scripts/figure.sh --data_tr DATA/train --data_val DATA/val --input_size 32
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
: "${OUT:=runs/figure}" "${SEEDS:=0 1 2}"

for seed in $SEEDS; do
    echo "--seed $seed --ignore_z 1 --uid mae-$seed"
    echo "--seed $seed --uid imle-$seed"
    echo "--seed $seed --mae_loss_weight 0 --uid alone-$seed"
done | bash scripts/train_many.sh \
    --data_tr demo/mnist_train.tar --data_val demo/mnist_val.tar --input_size 28 --use_augs 0 --num_workers 1 \
    --arch vit_demo --norm_pix_loss 0 --no-fp16 --finetune 0 --get_mae_baseline 0 \
    --epochs 16 --ex_per_epoch 4000 --ipe 125 --mini_bs 32 \
    --lr 1e-3 --lr_z 2e-3 --scheduler linear_ramp_cosine_decay --n_ramp 1 --ns 16 \
    --steps_per_eval 250 --z_per_ex_loss 32 --val_n_shot 400 --probe_bs 128 --probe_epochs 50 \
    --save_minutes 1 "$@" --save_folder "$OUT"

set -- "$OUT" --names imle=IMLE "alone=IMLE, --mae_loss_weight 0" mae=MAE
python scripts/figure.py "$@" --out "$OUT/figure.png"
python scripts/what_codes_add.py "$@" --out "$OUT/codes.png"
echo "Pictures: $OUT/figure.png, $OUT/codes.png, $OUT/codes_classes.png"
