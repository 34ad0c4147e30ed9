#!/usr/bin/env bash
# Set up .venv in this clone, then train the small models on real images: scripts/quickstart.py, with its options.
set -euo pipefail
source "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")/_venv.sh"

for argument in "$@"; do
    case $argument in
        -h | --help)  # needs no installation
            host=$(find_python) || exit
            exec "$host" "$root/scripts/quickstart.py" --help
            ;;
    esac
done

use_venv experiments
exec "$python" "$root/scripts/quickstart.py" "$@"
