# Sourced by the scripts beside it: makes the project's own Python environment, once, and sets $root and $python.
#
# It lives in .venv of the checkout. It is made anew when pyproject.toml or the pins have changed. Packages come from
# wherever the caller's own pip configuration says. PYTHON names the interpreter to start from (3.11 or newer).

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/../.." && pwd -P)
environment=$root/.venv
python=$environment/bin/python
newest=$environment/newest-transformers # an overlay: the newest transformers and what it needs beside the pinned rest
export PIP_DISABLE_PIP_VERSION_CHECK=1 PYTHONDONTWRITEBYTECODE=1
unset PYTHONPATH PYTHONHOME

say() { printf '\n== %s\n' "$*"; }

make_environment() {
    local wanted
    wanted=$(cat "$root/pyproject.toml" "$root/tools/ci/constraints.txt" "$root/tools/ci/constraints-newest.txt" | cksum)
    if [ "$(cat "$environment/made-from" 2>/dev/null)" = "$wanted $root" ]; then
        say "Using the environment in $environment"
        return
    fi
    local start=${PYTHON:-python3}
    "$start" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        { echo "Python 3.11 or newer is needed; set PYTHON to its path (tried: $start)" >&2; exit 2; }
    say "Making the environment in $environment (a few minutes the first time)"
    rm -rf "$environment"
    "$start" -m venv "$environment"
    # torch first and alone: its pin decides which build everything else is resolved against.
    "$python" -m pip install -qq --constraint "$root/tools/ci/constraints.txt" torch setuptools wheel
    "$python" -m pip install -qq --constraint "$root/tools/ci/constraints.txt" --editable "$root[test]"
    # Lets scripts in tools/ and tests/ import each other from wherever they are started.
    echo "$root" > "$("$python" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')/checkout.pth"
    "$python" -m pip install -qq --no-deps --target "$newest" --requirement "$root/tools/ci/constraints-newest.txt"
    echo "$wanted $root" > "$environment/made-from"
}
