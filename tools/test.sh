#!/usr/bin/env bash
# Creates the environment and runs all checks: style, types, layers, all tests with the pinned transformers, and the
# tests marked every_transformers with the newest transformers. Works from any folder. Arguments are passed to the first
# pytest run.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ci/environment.sh"
make_environment
cd "$root"

say "Style: ruff"
"$python" -m ruff check .
"$python" -m ruff format --check .

say "Types: mypy --strict"
"$python" -m mypy

say "Layers: import-linter"
"$environment/bin/lint-imports"

# One worker per core, with one thread each: thread pools that share cores slow each other down.
export OMP_NUM_THREADS=1
workers=(-n "$("$python" -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')" --dist loadscope)

say "Tests with transformers $("$python" -c 'import transformers; print(transformers.__version__)')"
"$python" -m pytest "${workers[@]}" "$@"

say "End-to-end tests with transformers $(PYTHONPATH=$newest "$python" -c 'import transformers; print(transformers.__version__)')"
PYTHONPATH=$newest "$python" -m pytest "${workers[@]}" -m every_transformers

say "All checks passed"
