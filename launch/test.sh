#!/usr/bin/env bash
# Set up, and run the tests: bash launch/test.sh [--quick] [pytest arguments]
# --quick: the model, the data and the configuration, in three minutes; they need no DeepSpeed.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
# DeepSpeed compiles two optimizers for the tests, minutes of work: kept for the next checkout on this machine, apart for
# each processor and each version. A build that was killed leaves a lock that later ones would wait for.
kind="$( (grep -m 1 -E '^(flags|Features)' /proc/cpuinfo || uname -m; cat requirements.txt) 2>/dev/null | cksum | cut -d ' ' -f 1)"
export TORCH_EXTENSIONS_DIR="${TORCH_EXTENSIONS_DIR:-${XDG_CACHE_HOME:-$HOME/.cache}/minimind/extensions-$kind}"
[ ! -d "$TORCH_EXTENSIONS_DIR" ] || find "$TORCH_EXTENSIONS_DIR" -name lock -mmin +30 -exec rm {} +
# shellcheck source=launch/env.sh
. launch/env.sh
# shellcheck source=launch/setup.sh
. launch/setup.sh
echo "[1/2] set up"
setup_venv requirements-dev.txt
echo "[2/2] run the tests"
if [ "${1:-}" = --quick ]; then
  shift
  set -- tests/model tests/data tests/data_prep/reading tests/config tests/test_{cli,files,imports,schema,units}.py -m "not slow" "$@"
fi
# One thread a process: the tests are small, and threads waiting for each other cost more than they give.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
# A test file is one worker's, so what its tests share is made once. Two workers more than there are cores, as half of the
# time is waiting for time-outs, services and disks; more than six workers would not end any sooner.
workers="$(.venv/bin/python -c 'from minimind.host import count_cores; print(min(count_cores() + 2, 6))')"
code=0
.venv/bin/python -m pytest --numprocesses "$workers" --dist loadfile --no-loadscope-reorder "$@" || code=$?
# All of that ran on the CPU. What is about a GPU runs by itself, where there is one.
if [ $# -eq 0 ] && command -v nvidia-smi >/dev/null; then .venv/bin/python -m pytest -m gpu || code=$?; fi
exit "$code"
