"""What was learnt for the tokens seen: the reference trainer and ours on the same text, evaluated in the same way.

    python benchmarks/learning.py --peer DIR [--text FILE.jsonl] [--tokens 250000]

Both train once over the same real tokens, at the same peak learning rate and about as many tokens an optimizer step;
the model is minimind3 in a smaller size, so that this takes minutes. Then the weights of both are read by our model
and scored on the same held-out texts: the mean loss of each token after the first, the text alone in its context, in
float32 (the reference's after its own start token, as it was trained).
"""

import json
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import tyro
from measure import ROOT, Claim, core_threads, environment, report
from peer import Peer, read_texts
from texts import find_text, make_shards

from minimind.export import load_any
from minimind.model import MiniMindForCausalLM
