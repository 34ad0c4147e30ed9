#!/usr/bin/env bash
# Set up .venv in this clone, then run every check: ruff, the test suite, and timm's own tests of our models.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/_venv.sh"

usage() {
    cat <<EOF
usage: bash scripts/test.sh [--slow] [--help]

Makes .venv in this clone (PYTHON=/path/to/python3 chooses the Python, 3.10 or newer), installs the package into it,
and runs ruff, the tests, and timm's own model tests for our quickest models. The second time it finds .venv ready.

  --slow  also the tests that take minutes each, and timm's own model tests for all of our models: over an hour
  --help  this text
EOF
}

which='not slow' models=--fast
for argument in "$@"; do
    case $argument in
        --slow) which='slow or not slow' models='' ;;
        -h | --help) usage; exit ;;
        *) fail "unknown argument $argument; bash scripts/test.sh --help says which there are" ;;
    esac
done

use_venv scripts test
cd "$root"
export OMP_NUM_THREADS=1  # two processes side by side are faster than two threads in one
"$python" -m ruff check .
"$python" -m ruff format --check .
# shellcheck disable=SC2086
"$python" tests/run_timm_tests.py $models -n 2
"$python" -m pytest -q -m "$which" -n 2 --dist loadscope  # last, so that its closing line is
