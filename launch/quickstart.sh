#!/usr/bin/env bash
# From nothing to a small model that answers, in about 8 minutes: bash launch/quickstart.sh
# A demonstration: a model of this size, after minutes, knows a few rules and sentences.
# Safe to run again: what is done is kept, and an interrupted training goes on from its last checkpoint.
# QUICKSTART_STEPS=N trains for N steps instead of as many as fit, and fine-tunes for two fifths as many, half as large.
# Everything lies in data/quickstart, runs/quickstart and runs/quickstart_chat.
set -euo pipefail
root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
cd "$root"
# shellcheck source=launch/env.sh
. launch/env.sh
# shellcheck source=launch/setup.sh
. launch/setup.sh

data=data/quickstart
run=runs/quickstart
chat=runs/quickstart_chat

# step NUMBER TITLE COMMAND...: run one step; its own error line has been printed when it fails.
step() {
  local number="$1" title="$2"
  shift 2
  echo
  echo "[$number/11] $title"
  "$@" || fail "step $number ($title) failed; the line above says why. Run the same command again to continue."
}

# once FOLDER_OR_FILE COMMAND...: skip a command whose result is there.
once() {
  local result="$1"
  shift
  if [ -e "$result" ]; then
    echo "      $result is there already"
  else
    "$@"
  fi
}

python=.venv/bin/python
step 1 "set up" setup_venv requirements.txt
step 2 "collect text that this machine already has" \
  once $data/corpus.jsonl $python -m data_prep.default_corpus --output $data/corpus.jsonl
step 3 "make conversations: questions by simple rules, and about Python's documentation" \
  once $data/chat/conversations.jsonl $python -m data_prep.default_conversations --output $data/chat
step 4 "train the tokenizer" \
  once $data/tokenizer/tokenizer.model $python -m data_prep.train_tokenizer \
  --input $data/corpus.jsonl $data/chat/conversations.jsonl --output $data/tokenizer
step 5 "turn the text into token shards" \
  once $data/shards/train/manifest.json $python -m data_prep.tokenize_corpus \
  --input $data/corpus.jsonl --tokenizer $data/tokenizer --output $data/shards
# Of what is left of 8 minutes five sixths are for this training, 2 minutes at least, and one for fine-tuning. The
# number stays for trainings that were interrupted.
seconds=$(((8 * 60 - 45 - SECONDS) * 5 / 6))
[ "$seconds" -ge 120 ] || seconds=120
title="train a model of 1.1 million parameters with DeepSpeed"
precision=""
if [ -n "${QUICKSTART_STEPS:-}" ]; then
  steps="$QUICKSTART_STEPS"
elif [ -e $data/steps.txt ]; then
  read -r steps precision <$data/steps.txt || true # one of an earlier version has no precision
else
  chosen="$($python launch/quickstart_steps.py "$seconds")" || fail "the speed of this machine could not be measured"
  echo "$chosen" >$data/steps.txt
  read -r steps precision <<<"$chosen"
  title="$title: $steps steps, at most $(((seconds + 30) / 60)) minutes here, and a fifth of it to fine-tune it"
fi
step 6 "$title" \
  bash launch/pretrain.sh --model quickstart --hidden-size 96 --shards $data/shards --run-dir $run \
  --ds-config ds_configs/zero1.json --steps "$steps" --seq-len 256 --global-batch-size 8 \
  ${precision:+--precision "$precision"} --schedule linear --min-lr-ratio 0 --eval-every $((steps / 4 > 0 ? steps / 4 : 1)) \
  --eval-samples 64 --save-every $((steps / 2 > 0 ? steps / 2 : 1))
step 7 "evaluate it on text that it has not seen" \
  $python -m minimind.evaluate --checkpoint $run --shards $data/shards --seq-len 256
step 8 "let it write" \
  $python -m minimind.generate --checkpoint $run --prompt "The function returns" --max-new-tokens 60 --seed 1

step 9 "turn the conversations into shards that say what is to be learnt" \
  once $data/chat/shards/train/manifest.json $python -m data_prep.tokenize_chat --input $data/chat/conversations.jsonl \
  --val-input $data/chat/held_out.jsonl --tokenizer $data/tokenizer --output $data/chat/shards --seq-len 256
answer() {
  rm -f "$2"* # of other weights
  $python -m minimind.answer --checkpoint "$1" --input $data/chat/held_out.jsonl --output "$2" \
    --max-new-tokens 32 --max-batch-size 64
}
step 10 "ask the model before fine-tuning" answer $run $run/answers.jsonl
step 11 "fine-tune it on the conversations, and ask again" \
  bash launch/sft.sh --init-from $run --shards $data/chat/shards --run-dir $chat --ds-config ds_configs/zero1.json \
  ${precision:+--precision "$precision"} --steps $(((2 * steps + 4) / 5)) --seq-len 256 --global-batch-size 4 --lr 2e-3 \
  --save-every $((steps / 4 > 0 ? steps / 4 : 1))
answer $chat $chat/answers.jsonl || fail "the fine-tuned model could not be asked"
$python launch/quickstart_answers.py $run/answers.jsonl $chat/answers.jsonl

cat <<TEXT

Done. What you have now:
  $data/corpus.jsonl     the text
  $data/shards           its tokens, and the tokenizer
  $data/chat             conversations, held-out questions, and their shards
  $run                   configuration, metrics.jsonl, TensorBoard, checkpoints
  $chat              the same of the fine-tuning

What to type next:
  .venv/bin/tensorboard --logdir runs                          look at the curves
  .venv/bin/python -m minimind.generate --checkpoint $run --prompt "Return the"
                                                               let it write again
  .venv/bin/python -m minimind.generate --checkpoint $chat     talk to it: a demonstration, it knows little else
  .venv/bin/python -m data_prep.tokenize_corpus --input pretrain.jsonl --tokenizer $data/tokenizer --output data/mine
                                                               your own text, such as a JSONL file of MiniMind's
  bash launch/pretrain.sh --model minimind3 --shards data/mine --run-dir runs/mine --dry-run
                                                               a larger model: leave out --dry-run to train
TEXT
