#!/usr/bin/env bash
# Trains IMLE and MAE from scratch on CIFAR-10's photographs with the same data, seeds, steps and evaluation. Fetches CIFAR-10 into
# DATA (170 MB). After an interruption, the same command goes on. Flags on the command line apply to all runs and override the flags
# below, but not --seed, --uid and --ignore_z. With your data (relative paths start at the repository):
#   OUT=runs/mine bash scripts/figure_cifar10.sh --data_tr DATA/train --data_val DATA/val --input_size 64
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
: "${OUT:=runs/cifar10}" "${SEEDS:=0 1 2}" "${DATA:=data/cifar10}"
[[ " $* " = *" --data_tr "* ]] || python scripts/get_cifar10.py "$DATA"

for seed in $SEEDS; do
    echo "--seed $seed --ignore_z 1 --uid mae-$seed"
    echo "--seed $seed --uid imle-$seed"
done | bash scripts/train_many.sh \
    --data_tr "$DATA/train.tar" --data_val "$DATA/val.tar" --input_size 32 --num_workers 1 \
    --arch vit_demo --no-fp16 --finetune 0 --get_mae_baseline 0 \
    --epochs 16 --ex_per_epoch 12000 --ipe 188 --mini_bs 64 \
    --lr 1e-3 --lr_z 2e-3 --scheduler linear_ramp_cosine_decay --n_ramp 1 --ns 8 \
    --steps_per_eval 752 --ex_for_mse_loss 1000 --z_per_ex_loss 16 --val_n_shot 400 --probe_bs 128 --probe_epochs 50 \
    --save_minutes 1 "$@" --save_folder "$OUT"

python scripts/figure.py "$OUT" --names imle=IMLE mae=MAE --out "$OUT/figure.png"
