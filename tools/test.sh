#!/usr/bin/env bash
# Makes the environment and runs every check: style, types, all tests with the pinned transformers, and the tests of the
# whole path once more with the newest one. Works from any folder. Arguments go to pytest (first run only).
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ci/environment.sh"
make_environment
cd "$root"

say "Style: ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .

say "Types: mypy --strict"
"$python" -m mypy

# One worker per core, one thread each: two thread pools on the same cores only wait for each other.
export OMP_NUM_THREADS=1
workers=(-n "$("$python" -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')" --dist loadscope)

say "Tests with transformers $("$python" -c 'import transformers; print(transformers.__version__)')"
"$python" -m pytest "${workers[@]}" "$@"

say "The whole path with transformers $(PYTHONPATH=$newest "$python" -c 'import transformers; print(transformers.__version__)')"
PYTHONPATH=$newest "$python" -m pytest "${workers[@]}" -m every_transformers

say "All checks passed"
