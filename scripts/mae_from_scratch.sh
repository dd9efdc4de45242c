#!/usr/bin/env bash
# The MAE that the paper compares IMLE with: the same run without codes. More flags are passed on and override.
exec bash "$(dirname "$0")/imle_from_scratch.sh" --suffix MAE_FROM_SCRATCH --ignore_z 1 "$@"
