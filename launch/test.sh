#!/usr/bin/env bash
# Set up, and run the tests: bash launch/test.sh [pytest arguments]
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
# shellcheck source=launch/env.sh
. launch/env.sh
# shellcheck source=launch/setup.sh
. launch/setup.sh
echo "[1/2] set up"
setup_venv requirements-dev.txt
echo "[2/2] run the tests"
# One thread a process: the tests are small, and threads waiting for each other cost more than they give.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec .venv/bin/python -m pytest "$@"
