#!/usr/bin/env bash
# The paper's IMLE run: from scratch on 32 classes of ImageNet with 64 images each, on two GPUs. The first line of flags names the
# original's values where the defaults are others. Further flags override.
set -euo pipefail
cd "$(dirname "$0")/.."
: "${IMAGENET_TRAIN:=data/imagenet/train}" "${IMAGENET_VAL:=data/imagenet/val}"

python TrainIMLE.py \
    --mae_loss_weight 0 --sampler exhaustive --adain_init original --latent_dim 512 --mapping_net_layers 8 --mapping_net_h_dim 512 \
    --gpus 0 1 --suffix IMLE_FROM_SCRATCH \
    --data_tr "$IMAGENET_TRAIN" --data_val "$IMAGENET_VAL" --fast_linear_probe 1 \
    --ex_for_mse_loss 2048 --ip_spec 11 adain --ex_per_epoch 2048 --code_bs 32 --sp 64 --ns 128 --mini_bs 64 --ipe 32 \
    --lr_z 1e-4 --lr 1e-4 --use_augs 1 --shuffle_data 1 --scheduler linear_ramp_cosine_decay --n_ramp 8 --epochs 512 \
    --save_iter 32 --train_n_way 32 --train_n_shot 64 --steps_per_eval 256 --wandb offline \
    --finetune 0 --ignore_z 0 --no-fp16 --num_workers 8 "$@"
