"""Run a command on simulated GPUs: python tests/support/simulated_device [--kind T4] [--devices 2] COMMAND"""

import argparse
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from simulated_device import PROFILES, Machine, environment

flags = argparse.ArgumentParser(description=__doc__)
flags.add_argument("--kind", choices=sorted(PROFILES), default="H100")
flags.add_argument("--devices", type=int, default=1)
flags.add_argument("command", nargs=argparse.REMAINDER)
given = flags.parse_args()
os.execvpe(given.command[0], given.command, environment(Machine(given.kind, given.devices)))
