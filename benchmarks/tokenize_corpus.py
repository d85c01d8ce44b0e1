"""Speed and memory of data_prep.tokenize_corpus beside the bare tokenizer library, in one run, on the same text.

    python benchmarks/tokenize_corpus.py [--megabytes 50] [--repeats 5] [--memory-megabytes 50 500]

The library encodes texts that are in memory already; the tool is timed as a command, from its start to its end, reading
JSONL and writing shards. Prints a table and writes JSON. Run it on a quiet machine.
"""

import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil
import sentencepiece
import tyro
from measure import Claim, environment, ratios
from measure import report as write_report
from texts import run_module

BATCH = 1000


def main(
    megabytes: int = 50,
    repeats: int = 5,
    memory_megabytes: tuple[int, ...] = (50, 500),
    output: Path | None = None,
) -> None:
    """Measure throughput and peak memory.

    Args:
        megabytes: size of the JSONL for the speed.
        repeats: runs of each; they take turns, and medians count.
        memory_megabytes: sizes of the JSONL for the peak memory, one run each.
        output: where the JSON goes.
    """
    where = environment()
    cores = len(os.sched_getaffinity(0))
    folder = Path(tempfile.mkdtemp(prefix="tokenize-corpus-"))
    try:
        base, tokenizer = prepare_inputs(folder)
        source = folder / "speed.jsonl"
        text_bytes = repeat_corpus(base, source, megabytes * 1_000_000)
        rows: dict[str, list[float]] = {"library, one core": [], "library, all cores at once": [], "tool": []}
        for _ in range(repeats):
            seconds = run_library(source, tokenizer, 1)
            rows["library, one core"].append(text_bytes / seconds / 1e6)
            seconds = run_library(source, tokenizer, cores)
            rows["library, all cores at once"].append(cores * text_bytes / seconds / 1e6)
            rows["tool"].append(text_bytes / run_tool(source, tokenizer, folder / "out")[0] / 1e6)
        peaks = {}
        for size in memory_megabytes:
            repeat_corpus(base, source, size * 1_000_000)
            peaks[size] = run_tool(source, tokenizer, folder / "out", measure_memory=True)[1]
    finally:
        shutil.rmtree(folder)
    report(rows, peaks, cores, where, output)


def prepare_inputs(folder: Path) -> tuple[Path, Path]:
    """The default corpus, and a tokenizer trained on it."""
    base = folder / "default.jsonl"
    run_module("data_prep.default_corpus", "--output", base)
    run_module("data_prep.train_tokenizer", "--input", base, "--output", folder / "tokenizer")
    return base, folder / "tokenizer" / "tokenizer.model"


def repeat_corpus(base: Path, target: Path, num_bytes: int) -> int:
    """Write lines of `base` over and over until the file has `num_bytes`; returns the UTF-8 bytes of their texts."""
    lines = base.read_bytes().splitlines(keepends=True)
    sizes = [len(json.loads(line)["text"].encode()) for line in lines]
    written = text_bytes = index = 0
    with target.open("wb") as file:
        while written < num_bytes:
            written += file.write(lines[index % len(lines)])
            text_bytes += sizes[index % len(lines)]
            index += 1
    return text_bytes


def run_library(source: Path, tokenizer: Path, processes: int) -> float:
    """Seconds that the slowest of `processes` takes to encode all texts of `source`, each for itself, all at once."""
    context = multiprocessing.get_context("spawn")
    barrier = context.Barrier(processes)
    results = context.Queue()
    workers = [context.Process(target=encode_all, args=(source, tokenizer, barrier, results)) for _ in range(processes)]
    for worker in workers:
        worker.start()
    seconds = max(results.get() for _ in workers)
    for worker in workers:
        worker.join()
    return seconds


def encode_all(source: Path, tokenizer: Path, barrier, results) -> None:
    model = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
    with source.open("rb") as file:
        texts = [json.loads(line)["text"] for line in file]
    barrier.wait()
    start = time.perf_counter()
    for i in range(0, len(texts), BATCH):
        model.encode(texts[i : i + BATCH], num_threads=1)
    results.put(time.perf_counter() - start)


def run_tool(
    source: Path, tokenizer: Path, output: Path, measure_memory: bool = False
) -> tuple[float, dict[str, float]]:
    """(seconds, peak MB of the whole process tree). Memory is only watched when asked: watching costs time."""
    shutil.rmtree(output, ignore_errors=True)
    flags = ["--input", source, "--tokenizer", tokenizer, "--output", output]
    command = [sys.executable, "-m", "data_prep.tokenize_corpus", *map(str, flags)]
    peak = {"pss": 0.0, "rss": 0.0}
    start = time.perf_counter()
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    while measure_memory and process.poll() is None:
        for kind, value in read_memory(process.pid).items():
            peak[kind] = max(peak[kind], value)
        time.sleep(0.1)
    if process.wait():
        raise SystemExit(f"{' '.join(command)} failed")
    return time.perf_counter() - start, peak


def read_memory(pid: int) -> dict[str, float]:
    """MB of a process and all below it: with shared pages counted once (pss), and in each process (rss)."""
    total = {"pss": 0.0, "rss": 0.0}
    try:
        root = psutil.Process(pid)
        processes = [root, *root.children(recursive=True)]
    except psutil.NoSuchProcess:
        return total
    for process in processes:
        try:
            memory = process.memory_full_info()
        except (psutil.NoSuchProcess, psutil.AccessDenied):
            continue
        for kind in total:
            total[kind] += getattr(memory, kind) / 1e6
    return total


def report(
    rows: dict[str, list[float]],
    peaks: dict[int, dict[str, float]],
    cores: int,
    where: dict[str, Any],
    output: Path | None,
) -> None:
    """Speeds in MB of text a second, their ratios, and the memory."""
    ideal = [cores * speed for speed in rows["library, one core"]]
    claims = [Claim(f"tokenizing: {name}", tuple(values), unit="MB/s") for name, values in rows.items()]
    claims += [
        Claim(
            f"tokenizing: tool over the bare library times {cores} cores", ratios(rows["tool"], ideal), 0.85, unit="x"
        ),
        Claim(
            "tokenizing: tool over the bare library on all cores at once",
            ratios(rows["tool"], rows["library, all cores at once"]),
            unit="x",
        ),
    ]
    for size, peak in peaks.items():
        name = f"tokenizing {size} MB: peak memory of all processes, shared pages once"
        claims.append(Claim(name, (peak["pss"],), 500.0, at_least=False, unit="MB"))
    write_report(__file__, where, claims, {"megabytes_per_second": rows, "peak_memory_megabytes": peaks}, output)


if __name__ == "__main__":
    tyro.cli(main)
