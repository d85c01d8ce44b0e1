#!/usr/bin/env bash
""":"
# Train:
#   bash launch/pretrain.sh FLAGS                          all GPUs of this machine, or one CPU rank (NUM_RANKS=2 for two)
#   ./launch/pretrain.sh FLAGS                             the same
#   deepspeed [launcher flags] launch/pretrain.sh FLAGS    through the deepspeed launcher, on this machine
#   launch/deepspeed --hostfile FILE launch/pretrain.sh FLAGS    the same over several hosts, checked
# FLAGS are those of `python -m minimind.train`. DRY_RUN=1 prints the command instead of running it.
# The other names of this file (dpo.sh, distill.sh ...) say which --objective is meant; sft.sh is a plain one.
# bash reads the next lines and leaves; Python, which the deepspeed launcher calls, takes all this for a string.
name="$(basename "$0" .sh)"
case "$name" in dpo | ipo | orpo | simpo | kto | distill | grpo) set -- --objective "$name" "$@" ;; esac
exec bash "$(dirname "${BASH_SOURCE[0]}")/local.sh" "$@"
":"""

import os
import sys
from pathlib import Path

LAUNCH = Path(__file__).resolve().parent
if (name := Path(__file__).stem) in ("dpo", "ipo", "orpo", "simpo", "kto", "distill", "grpo"):
    sys.argv[1:1] = ["--objective", name]

if "MINIMIND_SITE" not in os.environ:
    # A launcher has started this rank on a host where env.sh has not been read.
    os.environ |= {"MINIMIND_PYTHON": sys.executable, "NUM_RANKS": "1"}
    os.execvp("bash", ["bash", str(LAUNCH / "local.sh"), *sys.argv[1:]])

sys.path.insert(0, str(LAUNCH.parent))  # the launcher may start this anywhere

from minimind.distributed.environment import is_first_rank
from minimind.errors import run_main
from minimind.train import main

if __name__ == "__main__":
    run_main(main, quiet=not is_first_rank())
