#!/usr/bin/env bash
# The tests of layers, blocks and models under several instruction sets and thread counts: they must not depend on how
# this machine rounds. One line a run; logs in build/instruction_sets.
# usage: bash tests/instruction_sets.sh [--all] [PYTEST ARGUMENT...]
#   --all  every combination of the three settings, 18 runs in place of 6
#   PYTHON=/path/to/python chooses a Python in which the package is installed (default: .venv's)
#   PYTEST ARGUMENTs, for example tests/test_layers.py -k inductor, replace the list of files
set -uo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
python=${PYTHON:-.venv/bin/python}
"$python" -c 'import torch, timm_senetv2, pytest' || { echo "$python has no timm-senetv2; run scripts/test.sh first" >&2; exit 2; }

all=no
[ "${1:-}" = --all ] && { all=yes; shift; }
[ $# -gt 0 ] || set -- tests/test_{layers,blocks,models,fused,eager}.py
logs=build/instruction_sets
mkdir -p "$logs"

failed=0
for aten in default:SSE41 avx2:AVX2 avx512:AVX512_CORE; do
    for onednn in SSE41 AVX2 AVX512_CORE; do
        [ $all = yes ] || [ "${aten#*:}" = $onednn ] || continue
        for threads in 1 2; do
            log=$logs/${aten%:*}-$onednn-$threads.txt
            # Inductor finds what it compiled for one instruction set under another too, and cannot use it
            export TORCHINDUCTOR_CACHE_DIR=$PWD/$logs/inductor-${aten%:*}
            if ATEN_CPU_CAPABILITY=${aten%:*} ONEDNN_MAX_CPU_ISA=$onednn OMP_NUM_THREADS=$threads \
                "$python" -m pytest -q -p no:cacheprovider "$@" >"$log" 2>&1; then
                verdict=passed
            else
                verdict=FAILED failed=1
            fi
            printf '%-6s  aten %-7s  onednn %-11s  threads %s  %s\n' \
                $verdict "${aten%:*}" $onednn $threads "$(tail -n 1 "$log")"
            grep '^FAILED\|^ERROR' "$log" | sed 's/^/        /'
        done
    done
done
exit $failed
