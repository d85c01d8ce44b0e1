"""Decoding speed beside transformers' `generate`, in one run, on the same weights.

python benchmarks/generate.py [--model minimind3] [--new-tokens 256] [--repeats 3] [--threads 1]
"""

import contextlib
import copy
import functools
import json
import shutil
import statistics
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import torch
import tyro
import uvicorn
from harness import ROOT, Claim, make_tokenizer, ratios, report, time_rounds, transformers_model, workspace

from minimind.accelerator import default_device
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
DEVICE = default_device()
ON_GPU = DEVICE.type != "cpu"
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
    fastest = max((name for name in speeds if "minimind" in name), key=lambda name: statistics.median(speeds[name]))
    claims = []
    # The targets are a CPU's. A GPU's fastest is bf16.
    for way, target in (("minimind {}", None),) if ON_GPU else (("minimind {}", 1.3), (fastest, 2.0)):
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
        rows[f"minimind {name}"] = use_ours(prepare(base, dtype))
    if not ON_GPU:
        rows["minimind int8"] = use_ours(prepare(base, torch.bfloat16, int8=True))
    if not ON_GPU and shutil.which("g++") is not None:  # without it torch.compile does not compile for a CPU
        compiled = prepare(base, torch.bfloat16, int8=True)
        compiled.compile(dynamic=True)
        rows["minimind int8, compiled"] = use_ours(compiled)
    return rows


def prepare(base: MiniMindForCausalLM, dtype: torch.dtype, *, int8: bool = False) -> MiniMindForCausalLM:
    """A copy of another type, as the command loads it."""
    model = copy.deepcopy(base).to(DEVICE, dtype).eval()
    apply_kernels(model, DEVICE)
    prepare_decoding(model, int8=int8)
    return model


def greedy(count: int) -> Row:
    """A row of so many new tokens."""
    return Row(PROMPT, GenerationOptions(temperature=0.0, max_new_tokens=count))


def use_ours(model: MiniMindForCausalLM) -> Callable[[int], object]:
    return lambda count: list(decode(model, [greedy(count)]))


def measure_waiting(model: str, count: int) -> tuple[float, float]:
    """Seconds to a one-token answer beside a running one of `count` tokens: joined at once, and after its end."""
    decoding = Decoding(prepare(MiniMindForCausalLM(PRESETS[model]), torch.float32))
    decoding.join([greedy(count)])
    for _ in range(10):
        decoding.step()
    start = time.perf_counter()
    decoding.join([greedy(1)])
    decoding.step()
    joined = time.perf_counter() - start
    while decoding.rows:
        decoding.step()
    return joined, time.perf_counter() - start


def use_transformers(base: MiniMindForCausalLM, dtype: torch.dtype) -> Callable[[int], object]:
    from transformers.utils import logging

    logging.set_verbosity_error()
    theirs = transformers_model(base).to(DEVICE, dtype).eval()
    theirs.generation_config.eos_token_id = None
    input_ids = torch.tensor([PROMPT], device=DEVICE)
    mask = torch.ones_like(input_ids)
    return lambda count: theirs.generate(input_ids, attention_mask=mask, max_new_tokens=count, do_sample=False)


def measure_server(model: str, count: int, new_tokens: int) -> float:
    """Tokens a second of the server with `count` clients over HTTP, each with one request."""
    with workspace() as folder:
        (text := folder / "text.txt").write_text((ROOT / "README.md").read_text() * 4)
        tokenizer = load_tokenizer(make_tokenizer(text, folder, 2000))
    ours = prepare(MiniMindForCausalLM(PRESETS[model]), torch.bfloat16 if ON_GPU else torch.float32)
    body = json.dumps({"model": "m", "prompt": PROMPT, "max_tokens": new_tokens, "temperature": 0}).encode()
    listener = listen("127.0.0.1", 0)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/completions"

    def ask(_: int) -> int:
        request = urllib.request.Request(address, body, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["usage"]["completion_tokens"]

    with contextlib.closing(Batcher(ours, tokenizer, max_batch_size=count, max_waiting=count)) as batcher:
        app = build_app(batcher, tokenizer, model_name="m", defaults=GenerationOptions(), api_key=None)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        with ThreadPoolExecutor(count + 1) as threads:
            threads.submit(server.run, [listener])
            began = time.perf_counter()
            tokens = sum(threads.map(ask, range(count)))
            taken = time.perf_counter() - began
            server.should_exit = True
    return tokens / taken


if __name__ == "__main__":
    tyro.cli(main)
