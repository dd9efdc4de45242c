#!/usr/bin/env bash
# Compares many settings of IMLE, and controls, all from scratch with the protocol of figure.sh. All settings take hours on 2 CPU
# cores. After an interruption, the same command goes on. Flags on the command line apply to every run unless a setting names them;
# relative paths start at the repository. ONLY="imle|mae" runs these two settings alone.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
. scripts/digits.sh
: "${OUT:=runs/ablations}" "${SEEDS:=0}" "${ONLY:=.*}"

# One line per setting: name and flags.
settings() {
    cat << 'END'
mae --ignore_z 1
mae_32_images --ignore_z 1 --mini_bs 32
mae_twice_the_rate --ignore_z 1 --lr 2e-3
imle
imle_32_images --mini_bs 32
imle_twice_the_rate --lr 2e-3
imle_alone --mae_loss_weight 0
random_codes --ns 1
weight_.3 --mae_loss_weight .3
weight_3 --mae_loss_weight 3
original --adain_init original
ns_4 --ns 4
ns_64 --ns 64 --sampler exhaustive
ns_64_surrogate --ns 64
last_decoder_block --ip_spec 5 adain
last_decoder_block_ns_64 --ip_spec 5 adain --ns 64
mae_22_epochs --ignore_z 1 --epochs 22
first_decoder_block --ip_spec 4 adain
all_encoder_blocks --ip_spec 0 adain 1 adain 2 adain 3 adain
mask_token --ip_spec mask adain
ipe_500 --ipe 500 --epochs 4 --n_ramp 0
last_decoder_block_ipe_500 --ip_spec 5 adain --ipe 500 --epochs 4 --n_ramp 0
last_decoder_block_ipe_250 --ip_spec 5 adain --ipe 250 --epochs 8 --n_ramp 0
latent_4 --latent_dim 4
latent_128 --latent_dim 128
mask_.9_mae --ignore_z 1 --mask_ratio .9
mask_.9 --mask_ratio .9
mask_.9_mae_32_epochs --ignore_z 1 --mask_ratio .9 --epochs 32
long_mae --ignore_z 1 --epochs 80
long_imle --epochs 80
long_last_decoder_block --epochs 80 --ip_spec 5 adain --ns 64
END
}

for seed in $SEEDS; do
    settings | grep -E "^($ONLY)( |\$)" | while read -r name flags; do
        echo "--seed $seed $flags --uid $name-$seed"
    done
done | bash scripts/train_many.sh $DIGITS --steps_per_eval 100000 "$@" --save_folder "$OUT"

python scripts/figure.py "$OUT" --names $(settings | sed "s/ .*//; s/.*/&=&/")
