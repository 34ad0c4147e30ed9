#!/usr/bin/env bash
# Set up .venv in this clone, then run every check: ruff, mypy, the test suite, and timm's own tests of our models.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_venv.sh"

usage() {
    cat <<EOF
usage: bash scripts/test.sh [--slow] [--integration] [--help]

Makes .venv in this clone (PYTHON=/path/to/python3 chooses the Python, 3.10 or newer), installs the package into it,
and runs ruff, mypy, the tests, and timm's own model tests for our quickest models. The second time it finds .venv
ready.

  --slow         also the tests marked slow, which CI runs every week, and timm's own model tests for all of our
                 models: over an hour
  --integration  also the tests with other libraries, which it installs: 5 GB. With TIMM_REPO=/path/to/a/checkout/of/timm
                 those with its train.py too. Sweeps on Ray clusters of this machine are among them. Writes
                 results/integrations.csv and the tables of docs/integrations.md
  --help         this text
EOF
}

slow='not slow' extra='' models=--fast
for argument in "$@"; do
    case $argument in
        --slow) slow='(slow or not slow)' models='' ;;
        --integration) extra=integration ;;
        -h | --help) usage; exit ;;
        *) fail "unknown argument $argument; bash scripts/test.sh --help says which there are" ;;
    esac
done

# shellcheck disable=SC2086
use_venv hub gates train export experiments docs test $extra
cd "$root"
export OMP_NUM_THREADS=1  # two processes side by side are faster than two threads in one
"$python" -m ruff check .
"$python" -m ruff format --check .
"$python" -m mypy & types=$!  # beside the next, which leaves half a core
# shellcheck disable=SC2086
"$python" tests/run_timm_tests.py $models -n 2
wait "$types"
if [ -n "$extra" ]; then  # on their own: other tests compare the documents with the results that these write
    "$python" -m pytest -q -m "$slow and integration" -n 2 --dist loadscope tests/integration
    "$python" -m pytest -q -m "$slow and integration" tests/test_ray_executor.py tests/test_sweep_cost.py  # clusters
    "$python" scripts/docs.py docs/integrations.md
fi
"$python" -m pytest -q -m "$slow and not integration" -n 2 --dist loadscope  # last, so that its closing line is
