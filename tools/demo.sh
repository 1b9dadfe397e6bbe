#!/usr/bin/env bash
# Makes the environment, then compiles the tiny trained checkpoint that ships with the project and shows what it costs.
# Works from any folder, as often as you like. Everything it writes goes into .demo of the checkout.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/ci/environment.sh"
make_environment
cd "$root"
exec "$python" -m tools.demo.demo .demo
