#!/usr/bin/env bash
# Check an exercise of the course: bash launch/exercise.sh N [--solution]
# N: the number in docs/*/exercises.md; write your answer into exercises/eNN_*.py. --solution checks ours instead.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
if [ ! -x .venv/bin/python ]; then
  # shellcheck source=launch/env.sh
  . launch/env.sh
  # shellcheck source=launch/setup.sh
  . launch/setup.sh
  setup_venv requirements.txt
fi
exec .venv/bin/python exercises/check.py "$@"
