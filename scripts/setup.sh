# Makes ready to run, for the scripts beside it: the environment that is active, or else .venv, with requirements.txt.
if [ -z "${VIRTUAL_ENV:-}${CONDA_PREFIX:-}" ]; then
    [ -x .venv/bin/python ] || python3 -m venv .venv
    . .venv/bin/activate
fi
python -m pip install --quiet --disable-pip-version-check -r requirements.txt
