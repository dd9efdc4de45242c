# Sourced by other scripts: installs requirements.txt into the active environment, or into .venv if none is active.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
