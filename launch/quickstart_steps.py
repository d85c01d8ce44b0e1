"""Prints how many steps of the quickstart's training fit into a time here, and in which precision they are faster:
python launch/quickstart_steps.py SECONDS.

Forward and backward are timed on the machine itself, for a few seconds.
"""

import dataclasses
import sys
import time
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from minimind.accelerator import default_device
from minimind.model.kernels.apply import apply_kernels
from minimind.model.presets import PRESETS
from minimind.model.transformer import MiniMindForCausalLM

WINDOWS, SEQ_LEN = 8, 256
MODEL = dataclasses.replace(PRESETS["quickstart"], hidden_size=96)
"""Of minutes on two cores a model of 1.1 million parameters makes more than the preset's 5 million."""
FEWEST, MOST = 60, 3000
"""Too few steps teach nothing; more than these go round the small corpus again."""
BESIDES = 1.2
"""Seconds of a step of the whole run for a second of forward and backward: the optimizer (of processor time 7% beside
float32, more beside bf16), evaluations, checkpoints."""


def choose_steps(seconds: float, step_seconds: float) -> int:
    """Steps for about so many seconds, a multiple of 20."""
    return min(max(int(seconds / (BESIDES * step_seconds)) // 20 * 20, FEWEST), MOST)


def measure_step(device: torch.device, dtype: torch.dtype) -> float:
    """Seconds of one forward and backward over a global batch, without the first."""
    model = MiniMindForCausalLM(MODEL).to(device, dtype)
    apply_kernels(model, device)
    input_ids = torch.randint(MODEL.vocab_size, (WINDOWS, SEQ_LEN), device=device)
    times: list[float] = []
    while len(times) < 4 or sum(times) < 3:  # the shortest of several: other work on the machine comes and goes
        begin = time.perf_counter()
        loss = model(input_ids, input_ids).loss
        loss.backward()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - begin)
    return min(times[1:])


if __name__ == "__main__":
    device = default_device()
    # A GPU's precision is the run's own choice; of a processor only the clock says what bf16 is worth.
    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16} if device.type == "cpu" else {"": torch.float32}
    taken = {name: measure_step(device, dtype) for name, dtype in dtypes.items()}
    precision = min(taken, key=taken.__getitem__)
    print(choose_steps(float(sys.argv[1]), taken[precision]), precision)
