#!/usr/bin/env bash
# The shell half of pretrain.sh: read the site's settings, count the GPUs, and start a Python process for each.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# shellcheck source=launch/env.sh
. "$root/launch/env.sh"
export MINIMIND_SITE=1 # the settings are read
python="${MINIMIND_PYTHON:-$root/.venv/bin/python}"
[ -x "$python" ] || python="$(command -v python3)"
if [ -z "${NUM_RANKS:-}" ]; then
  if [ "${CUDA_VISIBLE_DEVICES+set}" ]; then
    NUM_RANKS="$(tr ',' '\n' <<<"$CUDA_VISIBLE_DEVICES" | grep -c . || true)" # empty: no GPU
  elif command -v nvidia-smi >/dev/null; then
    NUM_RANKS="$(nvidia-smi --list-gpus 2>/dev/null | grep -c '^GPU' || true)"
  elif [ -e /dev/nvidia0 ] || [ -e /dev/kfd ] || [ -e /dev/davinci_manager ] || [ -e /dev/dri ]; then
    # An image without it, or a device of AMD, Ascend or Intel.
    NUM_RANKS="$(cd "$root" && "$python" -c 'from minimind.accelerator import count_devices; print(count_devices())' \
      2>/dev/null || true)"
  fi
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
