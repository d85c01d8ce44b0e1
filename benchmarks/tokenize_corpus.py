"""Speed and memory of data_prep.tokenize_corpus beside the bare tokenizer library, in one run, on the same text.

python benchmarks/tokenize_corpus.py [--megabytes 50] [--repeats 5] [--memory-megabytes 50 500]
python benchmarks/tokenize_corpus.py --kinds code.jsonl chinese.jsonl ...     # bytes a token, by kind of text
"""

import itertools
import shutil
import subprocess
import sys
import time
import zlib
from pathlib import Path

import sentencepiece
import tokenizers
import tyro
from harness import OUT, ROOT, Claim, make_tokenizer, ratios, read_texts, report, run_module, workspace, write_texts
from turns import family, sum_up

from minimind.host import count_cores


def main(
    megabytes: int = 50, repeats: int = 5, memory_megabytes: tuple[int, ...] = (50, 500), kinds: tuple[Path, ...] = ()
) -> None:
    """Measure throughput at `megabytes` of JSONL, in turns, and the peak memory of one run for each other size."""
    if kinds:
        return compare_kinds(list(kinds))
    cores = count_cores()
    rows: dict[str, list[float]] = {"library, one core": [], "tool": []}
    with workspace() as folder:
        base, source = folder / "default.jsonl", folder / "speed.jsonl"
        run_module("data_prep.default_corpus", "--output", base)
        tokenizer = make_tokenizer(base, folder / "tokenizer") / "tokenizer.model"
        text_megabytes = repeat_corpus(base, source, megabytes * 1_000_000) / 1e6
        for _ in range(repeats):
            rows["library, one core"].append(text_megabytes / run_library(source, tokenizer))
            rows["tool"].append(text_megabytes / run_tool(source, tokenizer, folder / "out")[0])
        peaks = {}
        for size in memory_megabytes:
            repeat_corpus(base, source, size * 1_000_000)
            peaks[size] = run_tool(source, tokenizer, folder / "out", measure_memory=True)[1]
    ideal = [cores * speed for speed in rows["library, one core"]]
    claims = [Claim(f"tokenizing: {name}", values, unit="MB/s") for name, values in rows.items()]
    claims.append(Claim(f"tokenizing: tool over library times {cores}", ratios(rows["tool"], ideal), 0.85, unit="x"))
    name = "tokenizing {} MB: peak memory, shared pages once"
    claims += [Claim(name.format(size), (peak,), 500.0, at_least=False, unit="MB") for size, peak in peaks.items()]
    report(__file__, claims, {"megabytes_per_second": rows, "peak_memory_megabytes": peaks})


def compare_kinds(files: list[Path]) -> None:
    """Bytes a token of a quarter of each kind, by tokenizers that learn from the rest of all kinds."""
    texts = {file.stem: read_texts(file) for file in files}
    learnt = [text for found in texts.values() for text in found if zlib.crc32(text.encode()) % 4]
    bpe = tokenizers.ByteLevelBPETokenizer()  # as MiniMind trains it
    bpe.train_from_iterator(learnt, 6400, special_tokens=[f"<|{number}|>" for number in range(36)])
    encode = {"byte-level BPE": lambda text: bpe.encode(text).ids}
    with workspace() as folder:
        source = write_texts(folder / "text.jsonl", learnt)
        for flags in ((), ("--no-split-digits",), ("--no-split-digits", "--no-split-scripts")):
            file = make_tokenizer(source, folder / str(len(flags)), 6400, *flags) / "tokenizer.model"
            encode[" ".join(("ours", *flags))] = sentencepiece.SentencePieceProcessor(model_file=str(file)).encode
    claims = []
    for kind, name in itertools.product(texts, encode):
        held_out = [text for text in texts[kind] if zlib.crc32(text.encode()) % 4 == 0]
        ratio = sum(len(text.encode()) for text in held_out) / sum(len(encode[name](text)) for text in held_out)
        claims.append(Claim(f"{kind}: {name}", [ratio], unit="bytes a token"))
    report(__file__, claims, {}, OUT / "tokenizer_kinds.json")


def repeat_corpus(base: Path, target: Path, num_bytes: int) -> int:
    """Write `base` over and over until the file has `num_bytes`; returns the UTF-8 bytes of its texts."""
    content = base.read_bytes()
    repeats = -(-num_bytes // len(content))
    with target.open("wb") as file:
        file.writelines(itertools.repeat(content, repeats))
    return repeats * sum(len(text.encode()) for text in read_texts(base))


def run_library(source: Path, tokenizer: Path) -> float:
    """Seconds that one core takes to encode all texts of `source`, which are in memory."""
    model, texts = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer)), read_texts(source)
    start = time.perf_counter()
    model.encode(texts, num_threads=1)
    return time.perf_counter() - start


def run_tool(source: Path, tokenizer: Path, output: Path, measure_memory: bool = False) -> tuple[float, float]:
    """Seconds, and the peak MB of all its processes. Memory is only watched if asked: watching costs time."""
    shutil.rmtree(output, ignore_errors=True)
    command = [sys.executable, "-m", "data_prep.tokenize_corpus", "--input", source, "--tokenizer", tokenizer]
    peak, start = 0.0, time.perf_counter()
    process = subprocess.Popen(
        [*map(str, command), "--output", str(output)], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    while measure_memory and process.poll() is None:
        # Shared pages once.
        peak = max(peak, sum_up(family(process.pid), lambda one: one.memory_full_info().pss / 1e6))
        time.sleep(0.1)
    if process.wait():
        raise SystemExit(f"{' '.join(map(str, command))} failed")
    return time.perf_counter() - start, peak


if __name__ == "__main__":
    tyro.cli(main)
