#!/usr/bin/env bash
# Creates the environment and runs the demo: quantizes a tiny trained checkpoint and compares its answers.
# Works from any folder. Writes to .demo in the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ci/environment.sh"
make_environment
cd "$root"
exec "$python" -m tools.demo.demo .demo
