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
mpirun_flags=()
while [ $# -gt 0 ] && [ "$1" != -- ]; do
  mpirun_flags+=("$1")
  shift
done
[ $# -gt 0 ] || { echo "error: no -- between the flags of mpirun and those of the run" >&2; exit 2; }
shift
export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
start=("${MPIRUN:-mpirun}" "${mpirun_flags[@]}")
run=("$python" "$root/launch/pretrain.sh" "$@")
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${start[@]}" "${run[@]}"
  echo
  exit 0
fi
if [ -z "${MASTER_ADDR:-}" ]; then
  # mpirun tells a rank its number, but not where rank 0 is: every rank names its host and a free port, once.
  where='import os, socket
probe, rank = socket.create_server(("", 0)), os.environ.get("OMPI_COMM_WORLD_RANK", os.environ.get("PMI_RANK"))
print("minimind-rank", rank, socket.gethostname(), probe.getsockname()[1])'
  places="$("${start[@]}" "$python" -c "$where" | sed -n 's/.*minimind-rank //p')"
  read -r MASTER_ADDR port < <(sed -n 's/^0 //p' <<<"$places") ||
    { echo "error: ${start[0]} did not start rank 0; set MASTER_ADDR to its host" >&2; exit 2; }
  [ "$(cut -d ' ' -f 2 <<<"$places" | sort -u | wc -l)" -gt 1 ] || MASTER_ADDR=127.0.0.1
  MASTER_PORT="${MASTER_PORT:-$port}"
fi
exec "${start[@]}" env "MASTER_ADDR=$MASTER_ADDR" "MASTER_PORT=${MASTER_PORT:-29500}" "${run[@]}"
