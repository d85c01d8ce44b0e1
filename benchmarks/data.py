"""What the data path costs: a batch beside a step, opening many shards or many sources, and memory while reading.

python benchmarks/data.py [--shards 10000]
"""

import dataclasses
import itertools
from fractions import Fraction
from pathlib import Path

import numpy as np
import psutil
import torch
import tyro
from harness import Claim, ratios, report, time_rounds, workspace

from minimind.accelerator import default_device
from minimind.config.run_config import preset
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.manifest import Manifest, ShardInfo, TokenizerInfo
from minimind.data.mixture import NamedShards, open_mixture
from minimind.data.mixture_order import balanced_period
from minimind.data.shard_writer import write_random_tokens
from minimind.data.shards import ShardReader
from minimind.inference.evaluation import sum_loss
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels

SOURCES, MIXED_TOKENS = 20, 10**12
READS = 50  # batches that are timed together


def main(
    shards: int = 10_000, tokens_per_shard: int = 20_000, batch: int = 8, seq_len: int = 512, repeats: int = 5
) -> None:
    """Measure; everything that is timed is timed `repeats` times, in turns."""
    with workspace() as folder:
        one = write_random_tokens(folder / "random", 6400, tokens_per_shard, document_tokens=200) / "train"
        repeat_shard(one, folder / "many", shards)
        places = make_sources(folder / "mixture")
        loader = BatchLoader(TokenDataset(ShardReader(folder / "many"), seq_len, document_mask=True), 0, batch, batch)
        growth = read_everywhere(loader, steps=4000)
        mixture, numbers = open_sources(places, batch, seq_len), itertools.count()
        device = default_device()
        model = MiniMindForCausalLM(preset("minimind3")).to(device, torch.bfloat16)
        apply_kernels(model, device)
        tokens = loader.step_batches(0)[0].to(device)
        ways = {
            "opening": lambda: ShardReader(folder / "many"),
            "opening the mixture": lambda: open_sources(places, batch, seq_len),
            "batches": lambda: [loader.step_batches(next(numbers)) for _ in range(READS)],
            "batches of the mixture": lambda: [mixture.step_batches(next(numbers)) for _ in range(READS)],
            "step": lambda: sum_loss(model, tokens).loss.backward(),
        }
        seconds = time_rounds(ways, repeats)
    read, mixed = ([taken / READS for taken in seconds[f"batches{of}"]] for of in ("", " of the mixture"))
    shares, mixed_shares = ([100 * share for share in ratios(one, seconds["step"])] for one in (read, mixed))
    many = f"{MIXED_TOKENS:.0e} tokens in {SOURCES} sources"
    claims = [
        Claim(f"opening {shards:,} shards", seconds["opening"], 1.0, at_least=False, unit="s"),
        Claim("memory gained over 4,000 batches from all shards", (growth,), 50.0, at_least=False, unit="MB"),
        Claim(f"reading a batch of {batch} x {seq_len}", [1e3 * taken for taken in read], unit="ms"),
        Claim("reading a batch beside a bf16 step of minimind3", shares, 1.0, at_least=False, unit="%"),
        Claim(f"opening {many}, with the first batch", seconds["opening the mixture"], 1.0, at_least=False, unit="s"),
        Claim(f"reading a batch of {many} beside that step", mixed_shares, 1.0, at_least=False, unit="%"),
    ]
    report(__file__, claims, {**seconds, "batches timed together": READS})


def repeat_shard(one: Path, folder: Path, count: int, mark: int = 0) -> None:
    """A corpus of `count` shards, hard links to the only one of the corpus `one`. `mark` tells it from others."""
    folder.mkdir()
    manifest = Manifest.load(one)
    (shard,) = manifest.shards
    copies = []
    for number in range(count):
        names = {field: getattr(shard, field).replace("00000", f"{number:05d}") for field in ("file", "documents_file")}
        for field, name in names.items():
            (folder / name).hardlink_to(one / getattr(shard, field))
        copies.append(dataclasses.replace(shard, **names, sha256=f"{mark:032x}{number:032x}"))
    manifest.with_shards(tuple(copies), None).save(folder)


def make_sources(folder: Path) -> dict[str, Path]:
    """Corpora of `MIXED_TOKENS` tokens in all, of a shard that is all end tokens and takes no room on the disk."""
    size, no_hash = 500_000_000, "0" * 64
    (one := folder / "one").mkdir(parents=True)
    shard = ShardInfo("shard_00000.npy", "shard_00000.docs.npy", size, 1, 3 * size, no_hash, no_hash)
    for name, dtype, length in shard.arrays("uint16"):
        np.lib.format.open_memmap(one / name, "w+", dtype, (length,))
    Manifest(1, "uint16", 6400, 0, TokenizerInfo("tokenizer.json", no_hash), size, 1, 3 * size, (shard,)).save(one)
    places = {f"source{number}": folder / f"source{number}" for number in range(SOURCES)}
    for number, place in enumerate(places.values()):
        repeat_shard(one, place, MIXED_TOKENS // SOURCES // size, number)
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
    held = []
    for part in (range(steps // 10), range(steps // 10, steps)):
        for step in part:
            loader.step_batches(step)
        held.append(psutil.Process().memory_full_info().uss)
    return max(0, held[1] - held[0]) / 1e6


if __name__ == "__main__":
    tyro.cli(main)
