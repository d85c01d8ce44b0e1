"""What the data path costs: a batch beside a step, opening many shards or many sources, and memory while reading.

python benchmarks/data.py [--shards 10000]
"""

import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from harness import Claim, ratios, report, time_rounds, workspace

from minimind.accelerator import default_device
from minimind.config.run_config import preset
from minimind.data.array_file import npy_header
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.manifest import Manifest, ShardInfo, TokenizerInfo
from minimind.data.mixture import NamedShards, open_mixture
from minimind.data.mixture_order import balanced_period
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import ShardReader
from minimind.inference.evaluation import sum_loss
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels

SOURCES, MIXED_TOKENS = 20, 10**12
READS = 50  # batches that are timed together


def main(
    shards: int = 10_000, tokens_per_shard: int = 20_000, batch: int = 8, seq_len: int = 512, repeats: int = 5
) -> None:
    """Measure; the folder is opened, and batches and steps are timed, `repeats` times."""
    with workspace() as folder:
        make_shards(folder, shards, tokens_per_shard)
        openings = time_rounds({"open": lambda: ShardReader(folder)}, repeats, warm_up=0)["open"]
        places = make_sources(folder / "mixture")
        mixed = time_rounds({"open": lambda: open_sources(places, batch, seq_len)}, repeats, warm_up=0)["open"]
        mixture = open_sources(places, batch, seq_len)
        loader = BatchLoader(TokenDataset(ShardReader(folder), seq_len, document_mask=True), 0, batch, batch)
        growth = read_everywhere(loader, steps=4000)
        numbers = iter(range(10**6))
        read = lambda: [loader.step_batches(next(numbers)) for _ in range(READS)]  # noqa: E731
        read_mixed = lambda: [mixture.step_batches(next(numbers)) for _ in range(READS)]  # noqa: E731
        mixed_seconds = [taken / READS for taken in time_rounds({"read": read_mixed}, repeats, warm_up=0)["read"]]
        batch_seconds = [taken / READS for taken in time_rounds({"read": read}, repeats, warm_up=0)["read"]]
        device = default_device()
        model = MiniMindForCausalLM(preset("minimind3")).to(device, torch.bfloat16)
        apply_kernels(model, device)
        tokens = loader.step_batches(0)[0].to(device)
        step_seconds = time_rounds({"step": lambda: sum_loss(model, tokens).loss.backward()}, repeats)["step"]
    shares = [100 * share for share in ratios(batch_seconds, step_seconds)]
    mixed_shares = [100 * share for share in ratios(mixed_seconds, step_seconds)]
    many = f"{MIXED_TOKENS:.0e} tokens in {SOURCES} sources"
    claims = [
        Claim(f"opening {shards:,} shards", openings, 1.0, at_least=False, unit="s"),
        Claim("memory gained over 4,000 batches from all shards", (growth,), 50.0, at_least=False, unit="MB"),
        Claim(f"reading a batch of {batch} x {seq_len}", [1e3 * s for s in batch_seconds], unit="ms"),
        Claim("reading a batch beside a bf16 step of minimind3", shares, 1.0, at_least=False, unit="%"),
        Claim(f"opening {many}, with the first batch", mixed, 1.0, at_least=False, unit="s"),
        Claim(f"reading a batch of {many} beside that step", mixed_shares, 1.0, at_least=False, unit="%"),
    ]
    figures = {"opening": openings, "batch_seconds": batch_seconds, "step_seconds": step_seconds}
    report(__file__, claims, {**figures, "opening_mixture": mixed, "mixed_batch_seconds": mixed_seconds})


def make_shards(folder: Path, count: int, tokens: int) -> None:
    """`count` equal shards of random tokens in documents of 200: one is written, the others are hard links."""
    (folder / "tokenizer.json").write_text("{}")
    values = np.random.default_rng(0).integers(3, 6400, (tokens // 200, 199))
    with ShardWriter(
        folder / "one", vocab_size=6400, eos_token_id=0, tokenizer_file=folder / "tokenizer.json", shard_tokens=tokens
    ) as writer:
        for document in values:
            writer.add_document(document, 600)
    manifest = Manifest.load(folder / "one")
    (shard,) = manifest.shards
    copies = []
    for number in range(count):
        names = {field: getattr(shard, field).replace("00000", f"{number:05d}") for field in ("file", "documents_file")}
        for field, name in names.items():
            (folder / name).hardlink_to(folder / "one" / getattr(shard, field))
        copies.append(shard.__class__(**{**vars(shard), **names}))
    totals = {name: count * getattr(manifest, name) for name in ("total_tokens", "total_documents", "total_bytes")}
    Manifest(**{**vars(manifest), **totals, "shards": tuple(copies)}).save(folder)


def make_sources(folder: Path) -> dict[str, Path]:
    """Corpora of `MIXED_TOKENS` tokens in all: each shard is a link to one file, which is all end tokens and takes no
    room on the disk."""
    size = 500_000_000
    folder.mkdir()
    for name, dtype, length in (("tokens", "uint16", size), ("documents", "int64", 1)):
        header = npy_header(dtype, length)
        (folder / name).write_bytes(header)
        os.truncate(folder / name, len(header) + length * np.dtype(dtype).itemsize)
    places = {f"source{number}": folder / f"source{number}" for number in range(SOURCES)}
    for number, place in enumerate(places.values()):
        place.mkdir()
        shards = []
        for shard in range(MIXED_TOKENS // SOURCES // size):
            names = [f"shard_{shard:05d}.npy", f"shard_{shard:05d}.docs.npy"]
            for name, target in zip(names, ("tokens", "documents"), strict=True):
                (place / name).hardlink_to(folder / target)
            shards.append(ShardInfo(*names, size, 1, 3 * size, f"{number:032x}{shard:032x}", "0" * 64))
        totals = (size * len(shards), len(shards), 3 * size * len(shards))
        Manifest(1, "uint16", 6400, 0, TokenizerInfo("tokenizer.json", "0" * 64), *totals, tuple(shards)).save(place)
    return places


def open_sources(places: dict[str, Path], batch: int, seq_len: int) -> BatchLoader:
    """The loader of these sources, with weights whose period is the longest that there is, and its first batch read."""
    readers = {name: ShardReader(place) for name, place in places.items()}
    named = [NamedShards(name, "", Fraction(f"0.0{number + 3}1{number:03}7")) for number, name in enumerate(places)]
    balanced_period.cache_clear()
    loader = BatchLoader(open_mixture(named, readers, [], seq_len), 0, batch, batch)
    loader.step_batches(0)
    return loader


def read_everywhere(loader: BatchLoader, steps: int) -> float:
    """MB of memory gained while batches are read from all over the corpus, after the first tenth."""
    process, before = psutil.Process(), 0
    for step in range(steps):
        loader.step_batches(step)
        if step == steps // 10:
            before = process.memory_full_info().uss
    return max(0, process.memory_full_info().uss - before) / 1e6


if __name__ == "__main__":
    tyro.cli(main)
