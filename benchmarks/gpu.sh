#!/usr/bin/env bash
# What this machine's GPUs do, in one page: bash benchmarks/gpu.sh [--model NAME]... [--nodes]
# Checks the machine, runs the tests marked `gpu` (losses of every file of ds_configs/, dense and with experts, in fp32,
# bf16 and fp16 against the CPU's; a run killed and continued; evaluation, export and server; memory beside the plan),
# then the benchmarks; made for 25 minutes on one H100. Installs nothing.
# --nodes: inside a SLURM job, also over all its tasks. The page is benchmarks/gpu.md, or $BENCHMARKS_OUT/gpu.md.
# A rehearsal where there is no GPU: .venv/bin/python tests/support/simulated_device bash benchmarks/gpu.sh --model tiny
set -o pipefail # not -u: to macOS's bash an empty array is unset
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
models=() nodes=''
while [ $# -gt 0 ]; do
  case "$1" in
    --model) models+=("$2"); shift 2 ;;
    --nodes) nodes=1; shift ;;
    *) echo "error: unknown argument $1; give --model NAME or --nodes" >&2; exit 2 ;;
  esac
done
cd "$root" || exit 1
# shellcheck source=launch/env.sh
. launch/env.sh
unset OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
python=.venv/bin/python
[ -x "$python" ] || python="$(command -v python3)"
count="$("$python" -c 'import torch; print(torch.cuda.device_count() if torch.cuda.is_available() else 0)')"
if [ "${count:-0}" -eq 0 ]; then
  echo "no GPU: torch finds no CUDA device on this machine; python -m minimind.doctor says more" >&2
  exit 2
fi
if [ -n "$nodes" ] && [ -z "${SLURM_JOB_NODELIST:-}" ]; then
  echo "error: --nodes needs a SLURM job: sbatch or salloc first" >&2
  exit 2
fi
# Real sizes, or with small models short ones.
product=(--megabytes 256 --size 8192) shape=(--seq-len 2048) overhead=(--seq-len 2048 --batch 8 --compile) experts=(--tokens 16384)
decoding=(--new-tokens 256) times=1
[ ${#models[@]} -gt 0 ] || models=(minimind3 medium large)
if [ "${models[*]}" = tiny ]; then
  product=(--megabytes 8 --size 256 --rounds 2) shape=(--seq-len 64 --micro-batch-size 2 --steps 3)
  overhead=(--seq-len 64 --rounds 2) experts=(--tokens 256 --rounds 2 --hidden-size 64)
  decoding=(--new-tokens 8 --repeats 2 --waiting 60 --clients 4) times=4  # the minutes, on busy cores
fi
export BENCHMARKS_OUT="${BENCHMARKS_OUT:-$root/benchmarks/out/gpu}"
page="$BENCHMARKS_OUT/gpu.md"
rm -rf "$BENCHMARKS_OUT" && mkdir -p "$BENCHMARKS_OUT" && : >"$BENCHMARKS_OUT/failed.txt"

# run MINUTES COMMAND: ended when it takes longer than it may; the others go on.
run() {
  printf '\n== %s  (%s)\n' "${*:2}" "$(date +%H:%M:%S)"
  "$python" benchmarks/limit.py "$((times * $1))" "${@:2}" || echo "${*:2} (exit code $?)" >>"$BENCHMARKS_OUT/failed.txt"
}

run 2 "$python" -m minimind.doctor
run 2 "$python" benchmarks/gpu.py "${product[@]}"
all=("$python" -m torch.distributed.run --standalone "--nproc-per-node=$count")
if [ -n "$nodes" ]; then
  read -r MASTER_ADDR < <(scontrol show hostnames "$SLURM_JOB_NODELIST")
  export MASTER_ADDR MASTER_PORT="$((10000 + SLURM_JOB_ID % 20000))"
  all=(srun --mpi=none "$python")
fi
if [ -n "$nodes" ] || [ "$count" -gt 1 ]; then
  run 3 "${all[@]}" benchmarks/gpu.py "${product[@]}"
fi
run 10 "$python" -m pytest -q -m gpu --junitxml "$BENCHMARKS_OUT/tests.xml"
run 8 "$python" benchmarks/step.py --models "${models[@]}" "${shape[@]}"
if [ -n "$nodes" ] || [ "$count" -gt 1 ]; then
  run 5 "$python" benchmarks/step.py --models "${models[0]}" "${shape[@]}" --name step_all_ranks \
    --launcher "$(printf '%q ' "${all[@]}")"
fi
run 5 "$python" benchmarks/deepspeed_overhead.py --precision bf16 --model "${models[0]}" --micro-batches 1 "${overhead[@]}"
run 3 "$python" benchmarks/experts.py --precision bf16 "${experts[@]}"
run 3 "$python" benchmarks/generate.py --model "${models[0]}" "${decoding[@]}"

"$python" benchmarks/gpu.py --page "$page"
[ ! -s "$BENCHMARKS_OUT/failed.txt" ]
