#!/usr/bin/env bash
# What pretraining is worth for classes: fine-tunes encoders, and trains full probes on them with 1 %, 10 % and all of the labels
# (SHOTS: labelled images per class, of which CIFAR-10 has 5,000; -1: all). Encoders: of the runs RUNS/models/*-ARM-SEED that
# figure_cifar10.sh trains, and the same network untrained. After an interruption, the same command goes on; with other flags or
# settings choose another OUT. Flags on the command line apply to fine-tuning and probes. With your data, and runs of your own that
# were trained with --uid my_mae-0 and --uid my_imle-0 (ARM-SEED); relative paths start at the repository:
#   OUT=runs/mine RUNS=. ARMS="my_mae my_imle" SHOTS="10 100" bash scripts/downstream.sh --data_tr DATA/train --data_val DATA/val
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
: "${OUT:=runs/downstream}" "${RUNS:=runs/cifar10}" "${ARMS:=mae imle}" "${SEED:=0}" "${SHOTS:=50 500 -1}" "${DATA:=data/cifar10}"
: "${FINETUNE:=--epochs 2 --batch_size 64 --lr 4e-3 --mixup .2 --cutmix 0}" "${PROBE:=--use_augs 0 --lrs 10}"
[[ " $* " = *" --data_tr "* ]] || python scripts/get_cifar10.py "$DATA"
set -- --data_tr "$DATA/train.tar" --data_val "$DATA/val.tar" --num_workers 1 "$@"
mkdir -p "$OUT"

# result NAME COMMAND: runs the command and keeps the last line of its output, unless it is there already.
result() {
    local file="$OUT/$1.json"
    if [ ! -s "$file" ]; then
        echo "$1: ${*:2}"
        "${@:2}" | tee "$OUT/$1.log"
        tail -n 1 "$OUT/$1.log" > "$file.tmp"
        mv "$file.tmp" "$file"
    fi
}

for arm in $ARMS untrained; do
    if [ "$arm" = untrained ]; then  # all of its layers start alike: no reason for lower ones to learn more slowly
        model="untrained:$model" decay=1
    else
        model=$(echo "$RUNS"/models/*-"$arm-$SEED") decay=.75
    fi
    result "$arm-finetuned" python scripts/finetune.py "$model" --layer_decay "$decay" $FINETUNE --out "$OUT/$arm.pt" "$@"
    for shot in $SHOTS; do
        result "$arm-probe$shot" python LinearProbe.py --model "$model" $PROBE --train_n_shot "$shot" --save_folder "$OUT" "$@"
    done
done

python - "$OUT" "$ARMS untrained" "$SHOTS" << 'END'
import json, sys
from pathlib import Path
sys.path.append("scripts")
from figure import print_table

folder, arms, shots = Path(sys.argv[1]), *(words.split() for words in sys.argv[2:])
rows = [["encoder", "fine-tuned", *(f"probe, {'all' if shot == '-1' else shot} a class" for shot in shots)]]
for arm in arms:
    tuned, *probes = (json.loads((folder / f"{arm}-{part}.json").read_text()) for part in ["finetuned", *(f"probe{shot}" for shot in shots)])
    rows.append([arm, *(f"{accuracy:.3f}" for accuracy in (tuned["accuracy"], *(probe["top1"] for probe in probes)))])
print_table(rows)
END
