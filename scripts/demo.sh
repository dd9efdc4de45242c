#!/usr/bin/env bash
# Trains an MAE and IMLE on handwritten digits, in a few minutes on 2 CPU cores after the installation. Flags on the command
# line apply to both runs and override the flags below.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh

DATA="--data_tr demo/mnist_train.tar --data_val demo/mnist_val.tar --input_size 28 --use_augs 0"
MODEL="--arch vit_demo --norm_pix_loss 0 --no-fp16"
PROBE="--val_n_shot 400 --probe_bs 128 --probe_epochs 50"
OUT=${OUT:-models/demo-$(date +%Y%m%d-%H%M%S)}

# 1. A plain MAE, from scratch.
python TrainIMLE.py $DATA $MODEL $PROBE --save_folder "$OUT" --uid mae --finetune 0 --ignore_z 1 \
    --epochs 22 --ex_per_epoch 4000 --ipe 125 --mini_bs 32 --steps_per_eval 1375 \
    --lr 1e-3 --scheduler linear_ramp_cosine_decay --n_ramp 3 "$@"

# 2. IMLE from the MAE's weights: completions differ by code.
python TrainIMLE.py $DATA $MODEL $PROBE --save_folder "$OUT" --uid imle \
    --finetune 1 --mae_weights "$(ls "$OUT"/models/*-mae/checkpoints/step_*.pt | tail -n 1)" --get_mae_baseline 0 \
    --adain_init identity --latent_dim 32 --mapping_net_layers 3 --mapping_net_h_dim 64 --z_per_ex_loss 32 \
    --epochs 8 --ex_per_epoch 4000 --ipe 125 --mini_bs 32 --ns 16 --code_bs 32 --steps_per_eval 500 \
    --lr 3e-4 --lr_z 2e-3 --scheduler linear_ramp_cosine_decay --n_ramp 1 "$@"

echo
echo "Pictures: $OUT/models/*/images/   curves: $OUT/models/*/curves.png"
echo "Validation loss (mean over codes, best of 32 codes, without code), spread over codes, probe accuracy:"
python scripts/runs.py "$OUT"
