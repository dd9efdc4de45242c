#!/usr/bin/env bash
# Compares many settings of IMLE. All start from the same MAE's weights and train for about the same time; takes an hour and a
# half on 2 CPU cores. After an interruption, the same command goes on. Flags on the command line apply to every run unless a
# setting names them. ONLY="imle|mae" runs these two settings alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
: "${OUT:=runs/ablations}" "${SEEDS:=0 1}" "${ONLY:=.*}"

# One line per setting: name and flags. --epochs differs so that all settings take about the same time.
settings() {
    cat << 'END'
mae --ignore_z 1
mae_1500_steps --ignore_z 1 --epochs 12
mae_as_long --ignore_z 1 --epochs 16
imle
half_code_free --code_free_share .5
decoder --ip_spec 4 adain --epochs 8
all_encoder_blocks --ip_spec 0 adain 1 adain 2 adain 3 adain --epochs 4
original --adain_init original
all_defaults --adain_init original --lr_z 1e-4 --latent_dim 512 --mapping_net_layers 8 --mapping_net_h_dim 512 --epochs 5
original_lrmul_1 --adain_init original --mapping_net_lrmul 1
mask_.9_mae --ignore_z 1 --mask_ratio .9
mask_.9 --mask_ratio .9
ns_4 --ns 4 --epochs 11
ns_64 --ns 64 --epochs 2
ns_64_surrogate --ns 64 --sampler surrogate
ipe_500 --ipe 500 --epochs 3 --n_ramp 0
latent_4 --latent_dim 4
latent_128 --latent_dim 128
first_block --ip_spec 0 adain --epochs 4
mask_token --ip_spec mask adain
lr_z_3e-4 --lr_z 3e-4
lr_z_1e-2 --lr_z 1e-2
END
}

set -- --data_tr demo/mnist_train.tar --data_val demo/mnist_val.tar --input_size 28 --use_augs 0 --num_workers 1 \
    --arch vit_demo --norm_pix_loss 0 --no-fp16 --get_mae_baseline 0 --ex_per_epoch 4000 --ipe 125 --mini_bs 32 \
    --scheduler linear_ramp_cosine_decay --n_ramp 1 --steps_per_eval 100000 --z_per_ex_loss 32 \
    --val_n_shot 400 --probe_bs 128 --probe_epochs 50 --save_minutes 1 "$@"

for seed in $SEEDS; do
    echo "--seed $seed --uid start-$seed"
done | bash scripts/train_many.sh "$@" --ignore_z 1 --finetune 0 --epochs 16 --lr 1e-3 --save_folder "$OUT/start"

for seed in $SEEDS; do
    weights=$(ls "$OUT"/start/models/*-start-"$seed"/checkpoints/step_*.pt | tail -n 1)
    settings | grep -E "^($ONLY)( |\$)" | while read -r name flags; do
        echo "--mae_weights \"$weights\" --seed $seed $flags --uid $name-$seed"
    done
done | bash scripts/train_many.sh --epochs 6 --lr 3e-4 --lr_z 2e-3 --ns 16 \
    --adain_init identity --latent_dim 32 --mapping_net_layers 3 --mapping_net_h_dim 64 "$@" --save_folder "$OUT"

python scripts/figure.py "$OUT" --names start=start $(settings | sed "s/ .*//; s/.*/&=&/")
