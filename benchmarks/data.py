"""What the data path costs: a batch beside a step, opening many shards, and memory while reading.

    python benchmarks/data.py [--shards 10000]

The shards are small and made here; the step is minimind3's, forward and backward, on the same batch.
"""

import hashlib
import shutil
import tempfile
import time
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from measure import Claim, environment, ratios, report

from minimind.config.run_config import preset
from minimind.data.array_file import ArrayFile
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.manifest import Manifest, ShardInfo, TokenizerInfo
from minimind.data.shards import ShardReader
from minimind.model import MiniMindForCausalLM


def main(
    shards: int = 10_000,
    tokens_per_shard: int = 20_000,
    batch: int = 8,
    seq_len: int = 512,
    repeats: int = 5,
    output: Path | None = None,
) -> None:
    """Measure.

    Args:
        shards: number of shards.
        tokens_per_shard: their size.
        batch: sequences in a batch.
        seq_len: their length.
        repeats: how often the folder is opened, and how many batches and steps are timed.
        output: where the JSON goes.
    """
    where = environment()
    folder = Path(tempfile.mkdtemp(prefix="data-benchmark-"))
    try:
        make_shards(folder, shards, tokens_per_shard)
        openings = []
        for _ in range(repeats):
            began = time.perf_counter()
            reader = ShardReader(folder)
            openings.append(time.perf_counter() - began)
        dataset = TokenDataset(reader, seq_len, document_mask=True)
        loader = BatchLoader(dataset, 0, batch, batch)
        growth = read_everywhere(loader, steps=4000)
        batch_seconds = [time_batches(loader, 50 * number) for number in range(repeats)]
        step_seconds = time_steps(loader, repeats)
    finally:
        shutil.rmtree(folder)
    claims = [
        Claim(f"opening {shards:,} shards", tuple(openings), 1.0, at_least=False, unit="s"),
        Claim("memory gained over 4,000 batches from all shards", (growth,), 50.0, at_least=False, unit="MB"),
        Claim(f"reading a batch of {batch} x {seq_len}", tuple(1e3 * s for s in batch_seconds), unit="ms"),
        Claim(
            "reading a batch beside a bf16 step of minimind3",
            tuple(100 * share for share in ratios(batch_seconds, step_seconds)),
            1.0,
            at_least=False,
            unit="%",
        ),
    ]
    measured = {"opening_seconds": openings, "batch_seconds": batch_seconds, "step_seconds": step_seconds}
    report(__file__, where, claims, measured, output)


def make_shards(folder: Path, count: int, tokens: int) -> None:
    """A shard folder of random tokens in documents of about 200."""
    generator = np.random.default_rng(0)
    values = generator.integers(3, 6400, tokens)
    starts = np.arange(0, tokens, 200)
    values[np.append(starts[1:], tokens) - 1] = 0
    (folder / "tokenizer.json").write_text("{}")
    tokenizer = TokenizerInfo("tokenizer.json", hashlib.sha256(b"{}").hexdigest())
    infos = []
    for number in range(count):
        names = f"shard_{number:05d}.npy", f"shard_{number:05d}.documents.npy"
        digests = []
        for name, dtype, content in zip(names, ("uint16", "int64"), (values, starts), strict=True):
            if number:  # the same bytes again: a hard link costs no disk
                (folder / name).hardlink_to(folder / name.replace(f"{number:05d}", "00000"))
                continue
            file = ArrayFile(folder / name, dtype)
            file.append(content)
            digests.append(file.finish())
        if number:
            digests = [infos[0].sha256, infos[0].documents_sha256]
        infos.append(ShardInfo(*names, tokens, len(starts), 3 * tokens, *digests))
    Manifest(
        dtype="uint16",
        vocab_size=6400,
        eos_token_id=0,
        tokenizer=tokenizer,
        total_tokens=count * tokens,
        total_documents=count * len(starts),
        total_bytes=3 * count * tokens,
        shards=tuple(infos),
    ).save(folder)


def read_everywhere(loader: BatchLoader, steps: int) -> float:
    """MB of memory gained while batches are read from all over the corpus, after the first tenth."""
    process, before = psutil.Process(), 0
    for step in range(steps):
        loader.step_batches(step)
        if step == steps // 10:
            before = process.memory_full_info().uss
    return max(0, process.memory_full_info().uss - before) / 1e6


def time_batches(loader: BatchLoader, first: int) -> float:
    """Seconds of one batch, the mean of 50."""
    began = time.perf_counter()
    for step in range(first, first + 50):
        loader.step_batches(step)
    return (time.perf_counter() - began) / 50


def time_steps(loader: BatchLoader, count: int) -> list[float]:
    """Seconds of forward and backward of each of `count` batches."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = MiniMindForCausalLM(preset("minimind3")).to(device, torch.bfloat16)
    seconds = []
    for step in range(count + 1):
        (batch,) = loader.step_batches(step)
        moved = batch.to(device)
        began = time.perf_counter()
        output = model(moved.input_ids, moved.labels, position_ids=moved.position_ids, cu_seqlens=moved.cu_seqlens)
        output.loss.backward()
        if device.type == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - began)
        model.zero_grad()
    return seconds[1:]


if __name__ == "__main__":
    tyro.cli(main)
