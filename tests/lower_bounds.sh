#!/usr/bin/env bash
# The core tests with the lowest versions that pyproject.toml allows, in an environment of their own: build/lowest.
# usage: [PYTHON=/path/to/python3.10] bash tests/lower_bounds.sh
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/../scripts/_venv.sh"

host=$(PYTHON=${PYTHON:-python3.10} find_python) || exit
lowest=$(sed -n '/^dependencies = \[/,/^\]/s/^ *"\(.*\)>=\(.*\)",$/\1==\2/p' "$root/pyproject.toml")
venv=$root/build/lowest
python=$venv/bin/python
[ -x "$python" ] || "$host" -m venv "$venv"
# shellcheck disable=SC2086
"$python" -m pip install --quiet --disable-pip-version-check $lowest -e "$root[hub,train,export,experiments,test]"
echo "$("$python" --version)," $lowest
export OMP_NUM_THREADS=1
cd "$root"
"$python" tests/run_timm_tests.py --fast -n 2
"$python" -m pytest -q -n 2 tests/test_layers.py tests/test_blocks.py tests/test_models.py tests/test_registration.py tests/test_package.py
