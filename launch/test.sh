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
# A test file is one worker's, so what its tests share is made once; more than four workers would not end any sooner.
workers="$(env -u OMP_NUM_THREADS nproc)" # which nproc would take for an answer
[ "$workers" -le 4 ] || workers=4
exec .venv/bin/python -m pytest --numprocesses "$workers" --dist loadfile "$@"
