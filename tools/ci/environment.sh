# Sourced by tools/demo.sh and tools/test.sh: creates the Python environment in .venv of the checkout, and sets $root and
# $python. It is created again when pyproject.toml or the pins change. Uses the caller's pip configuration. PYTHON is the
# interpreter to use (3.11 or newer).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
environment=$root/.venv
python=$environment/bin/python
newest=$environment/newest-transformers # overlay with the newest transformers and its requirements
first_with_qwen3_vl=$environment/transformers-4.57 # overlay with the first transformers series that has Qwen3-VL
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH PYTHONHOME

say() { printf '\n== %s\n' "$*"; }

make_environment() {
    local stamp
    stamp=$(cat "$root/pyproject.toml" "$root"/tools/ci/constraints{,-newest,-4.57}.txt | cksum)
    if [ "$(cat "$environment/made-from" 2>/dev/null)" = "$stamp $root" ]; then
        say "Using the environment in $environment"
        return
    fi
    local start=${PYTHON:-python3}
    "$start" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "Python 3.11 or newer is required; set PYTHON to its path (tried: $start)" >&2; exit 2; }
    say "Creating the environment in $environment (a few minutes)"
    rm -rf "$environment"
    "$start" -m venv "$environment"
    # torch first: other packages are resolved against its pinned build.
    "$python" -m pip install -qq --constraint "$root/tools/ci/constraints.txt" torch setuptools wheel
    "$python" -m pip install -qq --constraint "$root/tools/ci/constraints.txt" --editable "$root[test]"
    # Makes tools/ and tests/ importable for scripts started from any folder.
    echo "$root" > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/checkout.pth"
    "$python" -m pip install -qq --no-deps --target "$newest" --requirement "$root/tools/ci/constraints-newest.txt"
    "$python" -m pip install -qq --no-deps --target "$first_with_qwen3_vl" \
        --requirement "$root/tools/ci/constraints-4.57.txt"
    echo "$stamp $root" > "$environment/made-from"
}
