#!/usr/bin/env bash
# Train under mpirun, Open MPI's or MPICH's: bash launch/pretrain_mpi.sh MPIRUN_FLAGS -- FLAGS
#   bash launch/pretrain_mpi.sh -np 16 -hostfile hosts -- --model minimind3 --shards /shared/shards --run-dir /shared/runs/mine
# FLAGS are those of `python -m minimind.train`. MPIRUN=PATH takes another mpirun; DRY_RUN=1 prints the command.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/env.sh
. "$root/launch/env.sh"
python="$root/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)"
command=("${MPIRUN:-mpirun}")
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  command+=("$1")
  shift
done
[ $# -gt 0 ] || { echo "error: no -- between the flags of mpirun and those of the run" >&2; exit 2; }
shift
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
command+=("$python" "$root/launch/pretrain.sh" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
