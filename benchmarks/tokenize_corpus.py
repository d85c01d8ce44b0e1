"""Speed and memory of data_prep.tokenize_corpus beside the bare tokenizer library, in one run, on the same text.

    python benchmarks/tokenize_corpus.py [--megabytes 50] [--repeats 5] [--memory-megabytes 50 500]

The library encodes texts that are in memory already; the tool is timed as a command, from its start to its end, reading
JSONL and writing shards. Prints a table and writes JSON. Run it on a quiet machine.
"""

import json
import multiprocessing
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil
import sentencepiece
import tyro

BATCH = 1000


def main(
    megabytes: int = 50,
    repeats: int = 5,
    memory_megabytes: tuple[int, ...] = (50, 500),
    output: Path = Path("benchmarks/out/tokenize_corpus.json"),
) -> None:
    """Measure throughput and peak memory.

    Args:
        megabytes: size of the JSONL for the speed.
        repeats: runs of each; they take turns, and medians count.
        memory_megabytes: sizes of the JSONL for the peak memory, one run each.
        output: where the JSON goes.
    """
    cores = len(os.sched_getaffinity(0))
    load = os.getloadavg()[0]
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
    report(rows, peaks, cores, load, output)


def prepare_inputs(folder: Path) -> tuple[Path, Path]:
    """The default corpus, and a tokenizer trained on it."""
    base = folder / "default.jsonl"
    run("data_prep.default_corpus", "--output", base)
    run("data_prep.train_tokenizer", "--input", base, "--output", folder / "tokenizer")
    return base, folder / "tokenizer" / "tokenizer.model"


def run(module: str, *flags: object) -> None:
    command = [sys.executable, "-m", module, *map(str, flags)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


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
    rows: dict[str, list[float]], peaks: dict[int, dict[str, float]], cores: int, load: float, output: Path
) -> None:
    medians = {name: statistics.median(values) for name, values in rows.items()}
    ideal, honest = medians["library, one core"] * cores, medians["library, all cores at once"]
    print(f"{cores} cores, load {load:.2f} at the start{' (NOT QUIET)' if load > 0.5 else ''}; MB of text a second")
    for name, values in rows.items():
        print(f"{name:28s} median {medians[name]:6.2f}   all {' '.join(f'{value:.2f}' for value in values)}")
    print(f"tool / (library, one core, times {cores} cores) = {medians['tool'] / ideal:.1%}")
    print(f"tool / (library, all cores at once)        = {medians['tool'] / honest:.1%}")
    for size, peak in peaks.items():
        print(f"peak memory with {size} MB of input: {peak['pss']:.0f} MB (rss summed: {peak['rss']:.0f} MB)")
    output.parent.mkdir(parents=True, exist_ok=True)
    result = {
        "cores": cores,
        "load_at_start": load,
        "megabytes_per_second": rows,
        "medians": medians,
        "tool_to_one_core_times_cores": medians["tool"] / ideal,
        "tool_to_all_cores_at_once": medians["tool"] / honest,
        "peak_memory_megabytes": peaks,
    }
    output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    tyro.cli(main)
