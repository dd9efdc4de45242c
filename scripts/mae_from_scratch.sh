#!/usr/bin/env bash
# The paper's MAE run: the same as its IMLE run, but without codes. Further flags override.
exec bash "$(dirname "$0")/imle_from_scratch.sh" --suffix MAE_FROM_SCRATCH --ignore_z 1 "$@"
