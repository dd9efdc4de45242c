#!/usr/bin/env bash
# Trains IMLE from scratch on handwritten digits, in a few minutes on 2 CPU cores after the installation: the first run of
# figure.sh. Flags on the command line override the flags of digits.sh. `bash scripts/demo.sh --ignore_z 1` trains an MAE instead.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
. scripts/digits.sh
: "${OUT:=models/demo-$(date +%Y%m%d-%H%M%S)}"

python TrainIMLE.py $DIGITS --steps_per_eval 500 --save_folder "$OUT" --uid demo "$@"

echo
echo "Pictures: $OUT/models/*/images/   curves: $OUT/models/*/curves.png"
echo "Validation loss (mean over codes, best of 32 codes, without code), spread over codes, probe accuracy:"
python scripts/runs.py "$OUT"
