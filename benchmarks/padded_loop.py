"""The plain way to train: transformers' Qwen3 of minimind3's shape on padded batches, AdamW, no library around it.

    python benchmarks/padded_loop.py --tokens FILE --length 340 --batch 8 --accumulation 2

FILE: JSON, one list of token ids a text, in the order of training. Prints one line a micro-batch; made for `train.py`.
"""

import json
from pathlib import Path

import torch
import tyro
from harness import transformers_model

from minimind.config.run_config import preset


def main(tokens: Path, length: int, batch: int, accumulation: int, model: str = "minimind3") -> None:
    """Train until the texts end: micro-batches of `batch` texts, each padded to `length` positions."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    texts = json.loads(tokens.read_text())
    network = transformers_model(preset(model)).to(device)
    optimizer = torch.optim.AdamW(network.parameters(), lr=5e-4)
    for number in range(len(texts) // batch):
        rows = texts[number * batch : (number + 1) * batch]
        input_ids = torch.tensor([row + [0] * (length - len(row)) for row in rows], device=device)
        labels = torch.tensor([row + [-100] * (length - len(row)) for row in rows], device=device)
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = network(input_ids, labels=labels).loss / accumulation
        loss.backward()
        if (number + 1) % accumulation == 0:
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        print(f"micro-batch {number + 1} loss {loss.item() * accumulation:.4f}", flush=True)


if __name__ == "__main__":
    tyro.cli(main)
