"""The reference trainer, jingyaogong/minimind, from a checkout of it: how it is started, and what it counts as a step.

Its files are copied to a temporary folder (it writes beside its sources) and run there unchanged. Knows nothing of
timing.
"""

import json
import shutil
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

PATTERN = r"Epoch:\[1/1\]\((?P<step>\d+)/\d+\)"
"""The line it prints after each micro-batch with --log_interval 1."""
_ORDER_SEED = 42  # its trainer seeds the order of the first epoch with 42 + 0


@dataclass(frozen=True)
class Peer:
    """A copy of the checkout in `folder`, ready to run."""

    folder: Path

    @classmethod
    def copied(cls, checkout: Path, folder: Path) -> "Peer":
        """Copy what its trainer needs. Exits with one line when `checkout` is no checkout of it."""
        if not (checkout / "trainer" / "train_pretrain.py").is_file():
            raise SystemExit(
                f"--peer {checkout}: no checkout of jingyaogong/minimind (trainer/train_pretrain.py missing)"
            )
        for part in ("model", "trainer", "dataset"):
            shutil.copytree(checkout / part, folder / part)
        return cls(folder)

    @property
    def tokenizer(self) -> Path:
        """Its tokenizer, for our shards of the same text."""
        return self.folder / "model" / "tokenizer.json"

    def command(
        self, text: Path, *, length: int, batch: int, accumulation: int, more: Sequence[object] = ()
    ) -> list[str]:
        """Its own trainer on `text` (JSONL), on the CPU or the first GPU; start it in `folder / "trainer"`."""
        flags: list[object] = [
            *("--data_path", text, "--max_seq_len", length, "--batch_size", batch),
            *("--accumulation_steps", accumulation, "--epochs", 1, "--log_interval", 1, "--num_workers", 1),
            *("--save_dir", self.folder / "out", "--save_interval", 10**9),
            *more,
        ]
        return [sys.executable, "train_pretrain.py", *map(str, flags)]

    def read_tokens(self, texts: Sequence[str], length: int) -> list[list[int]]:
        """Each text as its dataset gives it to the model, without the padding."""
        from transformers import AutoTokenizer

        if not texts:  # transformers' tokenizer takes no empty batch
            return []
        tokenizer = AutoTokenizer.from_pretrained(self.folder / "model")
        encoded = tokenizer(list(texts), add_special_tokens=False, max_length=length - 2, truncation=True).input_ids
        return [[tokenizer.bos_token_id, *tokens, tokenizer.eos_token_id] for tokens in encoded]


def micro_batches(num_texts: int, batch: int) -> list[list[int]]:
    """Which texts its trainer takes in each micro-batch of the first epoch."""
    order = torch.randperm(num_texts, generator=torch.Generator().manual_seed(_ORDER_SEED)).tolist()
    return [order[i : i + batch] for i in range(0, num_texts, batch)]


def read_texts(path: Path, limit: int | None = None) -> list[str]:
    """The `text` fields of a JSONL file."""
    texts = []
    with path.open(encoding="utf-8") as file:
        for line in file:
            if len(texts) == limit:
                break
            texts.append(json.loads(line)["text"])
    return texts
