#!/usr/bin/env bash
# Lints and tests the code: bash scripts/test.sh [--all] [arguments for pytest]. --all also runs the slow tests.
set -euo pipefail
cd "$(dirname "$0")/.."
. scripts/setup.sh
python -m pip install --quiet --disable-pip-version-check -r tests/requirements.txt

if [ "${1:-}" = --all ]; then shift; else set -- -m "not slow" "$@"; fi
python -m ruff check .
python -m ruff format --check .
OMP_NUM_THREADS=1 python -m pytest -q -n auto --maxprocesses 8 --dist worksteal "$@"
