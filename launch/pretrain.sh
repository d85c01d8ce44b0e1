#!/usr/bin/env bash
""":"
# Train: this file is a shell script and a Python program at once.
#   bash launch/pretrain.sh FLAGS                          all GPUs of this machine, or one CPU rank (NUM_RANKS=2 for two)
#   ./launch/pretrain.sh FLAGS                             the same
#   deepspeed [launcher flags] launch/pretrain.sh FLAGS    the deepspeed launcher hands it to Python: the part below
#   launch/deepspeed --hostfile FILE launch/pretrain.sh FLAGS    the same over several hosts, checked
# FLAGS are those of `python -m minimind.train`. DRY_RUN=1 prints the command instead of running it.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
. "$root/launch/env.sh"
export MINIMIND_SITE=1
python="${MINIMIND_PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3)"
if [ -z "${NUM_RANKS:-}" ]; then
  NUM_RANKS="$( { command -v nvidia-smi >/dev/null && nvidia-smi --list-gpus; } 2>/dev/null | grep -c '^GPU' || true)"
  if [ -n "${CUDA_VISIBLE_DEVICES:-}" ]; then NUM_RANKS="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c .)"; fi
  [ "${NUM_RANKS:-0}" -ge 1 ] || NUM_RANKS=1
fi
if [ "$NUM_RANKS" -eq 1 ]; then
  command=("$python" "$root/launch/pretrain.sh" "$@")
else
  command=("$python" -m minimind.distributed.launchers.local "$NUM_RANKS" "$root/launch/pretrain.sh" "$@")
  export PYTHONPATH="$root${PYTHONPATH:+:$PYTHONPATH}"
fi
if [ "${DRY_RUN:-0}" = 1 ]; then
  printf '%q ' "${command[@]}"
  echo
  exit 0
fi
exec "${command[@]}"
":"""

import os
import sys
from pathlib import Path

if "MINIMIND_SITE" not in os.environ:
    # A launcher has started us on a host whose settings nobody has read yet: once through the shell part above.
    os.environ |= {"MINIMIND_PYTHON": sys.executable, "NUM_RANKS": "1"}
    os.execvp("bash", ["bash", str(Path(__file__).resolve()), *sys.argv[1:]])

# The launcher may start us anywhere; the package lies beside this folder.
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minimind.distributed.environment import is_first_rank
from minimind.errors import run_main
from minimind.distributed.launchers.deepspeed import unpack_words
from minimind.train import main

if __name__ == "__main__":
    run_main(lambda: main(unpack_words(sys.argv[1:])), quiet=not is_first_rank())
