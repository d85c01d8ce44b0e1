#!/usr/bin/env bash
# Every benchmark that this machine can run, then one table: bash benchmarks/run_all.sh [--peer DIR] [--text FILE.jsonl]
# Made for under 40 minutes on two quiet cores. A benchmark that fails is named at the end; the others go on.
set -o pipefail # not -u: to macOS's bash an empty array is unset
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
# whole PATH: from any folder.
whole() { case "$1" in /*) echo "$1" ;; *) echo "$PWD/$1" ;; esac; }
peer=() text=()
while [ $# -gt 0 ]; do
  case "$1" in
    --peer) peer=(--peer "$(whole "$2")") ;;
    --text) text=(--text "$(whole "$2")") ;;
    *)
      echo "error: unknown argument $1; give --peer DIR or --text FILE.jsonl" >&2
      exit 2
      ;;
  esac
  shift 2
done
cd "$root" || exit 1
# shellcheck source=launch/env.sh
. launch/env.sh
python=.venv/bin/python
# The benchmarks use all cores; each says where it uses one.
unset OMP_NUM_THREADS
export TOKENIZERS_PARALLELISM=false HF_HUB_OFFLINE=1
# A processor without products in bf16 is measured in float32, which is slower: there each script takes fewer or smaller
# turns, and leaves out what nothing was promised for.
precision=bf16 start=() data=() experts=() stages=() train=() learning=() scaling=() decoding=()
if [ "$(PYTHONPATH=benchmarks "$python" -c 'import harness; print(harness.has_fast_bf16())')" != True ]; then
  precision=fp32 start=(--repeats 2) data=(--repeats 2) experts=(--rounds 2)
  stages=(--stages 1 2 3 --batch 1) train=(--batch 4 --programs minimind "ours fp32")
  learning=(--texts 1000) scaling=(--accumulation 1 --steps 1 --rounds 5) decoding=(--repeats 2)
fi
failed=()
rm -f benchmarks/out/*.json

# run NAME MINUTES ARGUMENTS: one benchmark, ended when it takes longer than it may.
run() {
  printf '\n== %s  (%s)\n' "$1" "$(date +%H:%M:%S)"
  "$python" benchmarks/limit.py "$2" "$python" "benchmarks/$1" "${@:3}" || failed+=("$1 ${*:3}")
}

run command.py 4 start "${start[@]}"
run data.py 4 "${data[@]}"
run step.py 5 --precision "$precision" --seq-len 340 --micro-batch-size 4 --steps 3 --ways plain "without kernels"
run experts.py 7 "${experts[@]}"
[ "$precision" = bf16 ] && run deepspeed_overhead.py 7 --precision bf16 --rounds 11 --minutes 6
run deepspeed_overhead.py 8 --precision fp32 --rounds 5 --minutes 6 "${stages[@]}"
if [ ${#peer[@]} -gt 0 ]; then
  run reference.py 12 speed "${peer[@]}" --rounds 2 --minutes 7 "${train[@]}" "${text[@]}"
  run step.py 8 "${peer[@]}" --precision bf16 --vocab-size 32000 --seq-len 340 --micro-batch-size 32 --steps 1 \
    --ways plain --name memory
  run reference.py 12 time-to-loss "${peer[@]}" --repeats 1 "${learning[@]}" "${text[@]}"
else
  failed+=("reference.py, memory beside the reference: not run, they need --peer DIR")
fi
run command.py 6 scaling --precision "$precision" --minutes 4 "${scaling[@]}" "${text[@]}"
run scaling.py 1
run tokenize_corpus.py 6 --repeats 2
run generate.py 6 "${decoding[@]}"

printf '\n'
"$python" benchmarks/harness.py
if [ ${#failed[@]} -gt 0 ]; then
  printf 'failed or not run: %s\n' "${failed[@]}"
  exit 1
fi
