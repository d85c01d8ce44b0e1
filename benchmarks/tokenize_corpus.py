"""Speed and memory of data_prep.tokenize_corpus beside the bare tokenizer library, in one run, on the same text.

python benchmarks/tokenize_corpus.py [--megabytes 50] [--repeats 5] [--memory-megabytes 50 500]
python benchmarks/tokenize_corpus.py --kinds code.jsonl chinese.jsonl ...     # bytes a token, by kind of text
"""

import contextlib
import itertools
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import harness
import psutil
import sentencepiece
import tokenizers
import tyro
from harness import OUT, Claim, find_text, make_shards, make_tokenizer, ratios, read_texts, report, workspace

from minimind.host import count_cores


def main(
    megabytes: int = 50, repeats: int = 5, memory_megabytes: tuple[int, ...] = (50, 500), kinds: tuple[Path, ...] = ()
) -> None:
    """Measure throughput at `megabytes` of JSONL, in turns, and the peak memory of one run for each other size."""
    if kinds:
        return compare_kinds(list(kinds))
    cores = count_cores()
    with workspace() as folder:
        base, source = find_text(None, folder), folder / "speed.jsonl"
        tokenizer = make_tokenizer(base, folder / "tokenizer") / "tokenizer.model"
        text_megabytes = repeat_corpus(base, source, megabytes * 1_000_000) / 1e6
        texts, library = read_texts(source), sentencepiece.SentencePieceProcessor(model_file=str(tokenizer))
        numbers = itertools.count()
        use_tool = lambda: make_shards(source, tokenizer, folder / f"shards{next(numbers)}")  # noqa: E731
        ways = {"library, one core": lambda: library.encode(texts, num_threads=1), "tool": use_tool}
        seconds = harness.time_rounds(ways, repeats, warm_up=0)
        rows = {name: [text_megabytes / taken for taken in values] for name, values in seconds.items()}
        peaks = {}
        for size in memory_megabytes:
            repeat_corpus(base, source, size * 1_000_000)
            peaks[size] = peak_megabytes(use_tool)
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
        source = harness.write_texts(folder / "text.jsonl", learnt)
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


def peak_megabytes(work: Callable[[], object]) -> float:
    """The most memory that all processes started by `work` hold together, shared pages counted once."""
    peak, this = 0.0, psutil.Process()
    with ThreadPoolExecutor(1) as pool:
        working = pool.submit(work)
        while not working.done():
            held = 0
            for process in this.children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess, psutil.AccessDenied):
                    held += process.memory_full_info().pss
            peak = max(peak, held / 1e6)
            time.sleep(0.1)
        working.result()
    return peak


if __name__ == "__main__":
    tyro.cli(main)
