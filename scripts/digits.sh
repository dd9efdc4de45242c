# Sourced by demo.sh, figure.sh and ablations.sh: the flags of training from scratch on the demo's digits.
DIGITS="--data_tr demo/mnist_train.tar --data_val demo/mnist_val.tar --input_size 28 --use_augs 0 --num_workers 1
    --arch vit_demo --norm_pix_loss 0 --no-fp16 --finetune 0 --get_mae_baseline 0
    --epochs 16 --ex_per_epoch 4000 --ipe 125 --mini_bs 64
    --lr 1e-3 --lr_z 2e-3 --scheduler linear_ramp_cosine_decay --n_ramp 1 --ns 16
    --steps_per_eval 250 --z_per_ex_loss 32 --val_n_shot 400 --probe_bs 128 --probe_epochs 50 --save_minutes 1"
