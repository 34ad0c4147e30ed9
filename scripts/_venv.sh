# shellcheck shell=bash
# Sourced by quickstart.sh and test.sh: the virtual environment .venv of this clone, with this package in it.

# no cd: with CDPATH exported it would print, and might lead elsewhere
root=$(dirname "$(dirname "$(readlink -f "${BASH_SOURCE[0]}")")")
venv=$root/.venv
python=$venv/bin/python
state=$venv/.timm-senetv2
unset PYTHONDONTWRITEBYTECODE  # with it set, each program would compile torch and timm anew, which takes 12 s

fail() {
    echo "error: $*" >&2
    exit 2
}

is_new_enough() {
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 10))' 2>/dev/null
}

# Prints the first Python of at least 3.10; $PYTHON, if set, is the only candidate.
find_python() {
    local candidate candidates=(python3 python3.14 python3.13 python3.12 python3.11 python3.10 python)
    [ -z "${PYTHON:-}" ] || candidates=("$PYTHON")
    for candidate in "${candidates[@]}"; do
        if is_new_enough "$candidate"; then
            echo "$candidate"
            return
        fi
    done
    fail "no Python 3.10 or newer found as ${PYTHON:-python3}; install one, or say where it is: PYTHON=/path/to/python3"
}

# use_venv EXTRA...: leaves .venv with this package and the extras installed, from the code of this clone.
# A folder .venv/.timm-senetv2 says how far that came: `ours` if we made the environment, `installing` while pip runs,
# and for each finished extra a file with what it was installed from.
use_venv() {
    local extra missing='' key host
    key=$(echo "$root"; cat "$root/pyproject.toml" "$root/timm_senetv2_autoload.py")
    for extra in "$@"; do
        [ "$(cat "$state/$extra" 2>/dev/null)" = "$key" ] || missing=yes
    done
    if [ -z "$missing" ] && is_new_enough "$python"; then
        return
    fi

    if [ -f "$state/installing" ]; then
        if kill -0 "$(cat "$state/installing")" 2>/dev/null; then
            fail "another process, $(cat "$state/installing"), is installing into $venv; wait until it has finished"
        fi
        echo "The last installation into $venv was interrupted; starting over."
        rm -rf "$venv"
    elif [ -f "$state/ours" ] && ! is_new_enough "$python"; then
        echo "The Python of $venv is gone; starting over."
        rm -rf "$venv"
    fi
    if [ ! -e "$venv" ]; then
        host=$(find_python) || exit
        mkdir -p "$state" || fail "cannot write to $root; clone it into a folder of your own"
        touch "$state/ours"
        echo $$ > "$state/installing"
        if ! "$host" -m venv "$venv" > "$state/venv.log" 2>&1; then
            cat "$state/venv.log" >&2
            rm -rf "$venv"
            fail "$host -m venv failed; on Debian and Ubuntu, install the package python3-venv"
        fi
    fi
    is_new_enough "$python" || fail "$venv has no Python of 3.10 or newer; move it away and run this again"

    local quiet=--quiet
    [ -t 1 ] && quiet=''
    echo "Installing into $venv; the first time this takes some minutes, most of them for PyTorch."
    mkdir -p "$state"
    [ -f "$state/ours" ] && echo $$ > "$state/installing"  # what we did not make, we never clear
    # from within, so that the path may hold any character; not compiled, since few of 14,000 files are ever imported
    # shellcheck disable=SC2086
    (cd "$root" && "$python" -m pip install $quiet --no-compile --disable-pip-version-check -e ".[$(IFS=,; echo "$*")]") ||
        fail "the installation failed, see above; run this again to start it over"
    for extra in "$@"; do
        echo "$key" > "$state/$extra"
    done
    rm -f "$state/installing"
}
