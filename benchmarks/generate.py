"""Decoding speed beside transformers' `generate`, in one run, on the same weights.

python benchmarks/generate.py [--model minimind3] [--new-tokens 256] [--repeats 3] [--threads 1]
"""

import contextlib
import dataclasses
import functools
import json
import shutil
import statistics
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
import tyro
import uvicorn
from harness import ROOT, Claim, make_tokenizer, ratios, report, time_rounds, transformers_model, workspace

from minimind.data.tokenizer import load_tokenizer
from minimind.inference.batching import Batcher
from minimind.inference.decoding import Decoding, Row, decode
from minimind.inference.http_api import build_app
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels.apply import apply_kernels
from minimind.model.kernels.packed_weights import prepare_decoding
from minimind.serve import listen

PROMPT = [5, 6, 7, 8, 9, 10, 11, 12]
ON_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda" if ON_GPU else "cpu")
PRECISIONS = {"fp32": torch.float32, "bf16": torch.bfloat16}


def main(
    model: str = "minimind3", new_tokens: int = 256, repeats: int = 3, threads: int = 1, waiting: int = 3000,
    clients: int = 32,
) -> None:  # fmt: skip
    """Measure.

    Args:
        model: preset, with random weights, whose speed is measured.
        waiting: tokens of an answer that a request of one token comes upon.
        clients: of the server, with a request each.
    """
    torch.set_num_threads(threads)
    rows = build_rows(model)
    for run in rows.values():
        run(8)
    seconds = time_rounds({name: functools.partial(run, new_tokens) for name, run in rows.items()}, repeats, warm_up=0)
    speeds = {name: [new_tokens / taken for taken in values] for name, values in seconds.items()}
    title = f"decoding {model}, {new_tokens} new tokens, {threads} threads"
    ours = [name for name in speeds if name.startswith("minimind")]
    fastest = max(ours, key=lambda name: statistics.median(speeds[name]))
    claims = []
    # The targets are a CPU's.
    for way, target in (("minimind {}", None if ON_GPU else 1.3), (fastest, None if ON_GPU else 2.0)):
        for name in PRECISIONS:
            shares = ratios(speeds[way.format(name)], speeds[f"transformers {name}"])
            claims.append(Claim(f"{title}: {way.format(name)} over transformers {name}", shares, target, unit="x"))
    claims += [Claim(f"{title}: {name}", values, unit="tokens/s") for name, values in speeds.items()]
    joined, waited = measure_waiting("quickstart", waiting)
    name = f"quickstart, one token beside an answer of {waiting}: waiting for its end over joining it ({joined:.3f} s)"
    claims.append(Claim(name, (waited / joined,), 20.0, unit="x"))
    rate = measure_server(model, clients, new_tokens)
    claims.append(Claim(f"serving {model} to {clients} clients", (rate,), unit="tokens/s"))
    report(__file__, claims, {"tokens_per_second": speeds})


def build_rows(model: str) -> dict[str, Callable[[int], object]]:
    """What is measured: a name, and a function that decodes so many tokens."""
    torch.manual_seed(0)
    base = MiniMindForCausalLM(PRESETS[model]).eval()
    rows: dict[str, Callable[[int], object]] = {}
    for name, dtype in PRECISIONS.items():
        rows[f"transformers {name}"] = use_transformers(base, dtype)
        rows[f"minimind {name}"] = use_ours(copy_of(base, dtype))
    if not ON_GPU:
        rows["minimind int8"] = use_ours(copy_of(base, torch.bfloat16, int8=True))
    if not ON_GPU and shutil.which("g++") is not None:  # without it torch.compile does not compile for a CPU
        compiled = copy_of(base, torch.bfloat16, int8=True)
        compiled.compile(dynamic=True)
        rows["minimind int8, compiled"] = use_ours(compiled)
    return rows


def copy_of(base: MiniMindForCausalLM, dtype: torch.dtype, *, int8: bool = False) -> MiniMindForCausalLM:
    """The same weights as another type, as the command loads them."""
    copy = MiniMindForCausalLM(base.config)
    copy.load_state_dict(base.state_dict())
    copy = copy.to(DEVICE, dtype).eval()
    apply_kernels(copy, DEVICE)
    prepare_decoding(copy, int8=int8)
    return copy


def use_ours(model: MiniMindForCausalLM) -> Callable[[int], object]:
    def run(count: int) -> None:
        for _ in decode(model, [Row(PROMPT, GenerationOptions(temperature=0.0, max_new_tokens=count))]):
            pass

    return run


def measure_waiting(model: str, count: int) -> tuple[float, float]:
    """Seconds to a one-token answer beside a running one of `count` tokens: joined at once, and after its end."""
    ours = copy_of(MiniMindForCausalLM(PRESETS[model]), torch.float32)
    decoding = Decoding(ours)
    long, short = (Row(PROMPT, GenerationOptions(temperature=0.0, max_new_tokens=tokens)) for tokens in (count, 1))
    decoding.join([long])
    for _ in range(10):
        decoding.step()
    start = time.perf_counter()
    decoding.join([short])
    decoding.step()
    joined = time.perf_counter() - start
    while decoding.rows:
        decoding.step()
    return joined, time.perf_counter() - start


def use_transformers(base: MiniMindForCausalLM, dtype: torch.dtype) -> Callable[[int], object]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    theirs = transformers_model(base.config)
    theirs.load_state_dict(base.state_dict())
    theirs = theirs.to(DEVICE, dtype).eval()
    theirs.generation_config.eos_token_id = None
    input_ids = torch.tensor([PROMPT], device=DEVICE)
    mask = torch.ones_like(input_ids)
    return lambda count: theirs.generate(input_ids, attention_mask=mask, max_new_tokens=count, do_sample=False)


def measure_server(model: str, count: int, new_tokens: int) -> float:
    """Tokens a second of the server with `count` clients over HTTP, each with one request."""
    dtype = torch.bfloat16 if ON_GPU else torch.float32
    with workspace() as folder:
        (text := folder / "text.txt").write_text((ROOT / "README.md").read_text() * 4)
        tokenizer = load_tokenizer(make_tokenizer(text, folder, 2000))
        config = dataclasses.replace(PRESETS[model], vocab_size=tokenizer.vocab_size)
        ours = copy_of(MiniMindForCausalLM(config), dtype)
        with contextlib.closing(Batcher(ours, tokenizer, max_batch_size=count, max_waiting=count)) as batcher:
            return ask_all(batcher, tokenizer, count, new_tokens)


def ask_all(batcher: Batcher, tokenizer: Any, count: int, new_tokens: int) -> float:
    """The same, of one batcher behind the application of `minimind.serve`."""
    app = build_app(batcher, tokenizer, model_name="m", defaults=GenerationOptions(), api_key=None)
    listener = listen("127.0.0.1", 0)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
    thread = threading.Thread(target=server.run, args=([listener],))
    thread.start()
    body = {"model": "m", "prompt": PROMPT, "max_tokens": new_tokens, "temperature": 0}
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"

    def ask(_: int) -> int:
        request = urllib.request.Request(address, json.dumps(body).encode(), {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    began = time.perf_counter()
    with ThreadPoolExecutor(count) as clients:
        tokens = sum(clients.map(ask, range(count)))
    taken = time.perf_counter() - began
    server.should_exit = True
    thread.join()
    return tokens / taken


if __name__ == "__main__":
    tyro.cli(main)
