#!/usr/bin/env bash
# Creates the environment and runs all checks: style, types, layers, all tests with the pinned transformers, the tests
# marked every_transformers or qwen3_vl with the newest transformers, and those marked qwen3_vl with transformers 4.57.
# Works from any folder. Arguments are passed to the first pytest run.
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

# Compiled once for all processes that the tests start: these write no bytecode.
"$python" -m compileall -q vlqc passes kernels_ref tools tests/support

# One worker per core, with one thread each: thread pools that share cores slow each other down.
export OMP_NUM_THREADS=1
workers=(-n "$("$python" -c 'import os; print(min(4, len(os.sched_getaffinity(0))))')" --dist loadscope)

version_of() { PYTHONPATH=$1 "$python" -c 'import transformers; print(transformers.__version__)'; }

say "Tests with transformers $(version_of "")"
"$python" -m pytest "${workers[@]}" "$@"

say "End-to-end tests with transformers $(version_of "$newest")"
PYTHONPATH=$newest "$python" -m pytest "${workers[@]}" -m "every_transformers or qwen3_vl"

say "Tests of Qwen3-VL with transformers $(version_of "$first_with_qwen3_vl")"
PYTHONPATH=$first_with_qwen3_vl "$python" -m pytest "${workers[@]}" -m "qwen3_vl and not one_version"

say "All checks passed"
