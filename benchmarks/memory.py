"""Peak memory of a training step beside the reference's: same batch, vocabulary 32000, float32, AdamW.

    python benchmarks/memory.py --peer DIR [--batch 4] [--length 512] [--vocab-size 32000]

Each step runs in a process of its own, which first imports everything and then counts what it needs on top: the growth
of its peak resident memory on a CPU, the allocator's peak on a GPU. Ours keeps no full logits and no recomputation is
on; that its loss is exact is checked in the same run against the plain cross-entropy.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import tyro
from measure import Claim, core_threads, environment, ratios, report
from peer import Peer

KINDS = ("minimind", "Qwen3", "ours fp32", "ours bf16")


def main(
    peer: Path,
    batch: int = 8,
    length: int = 512,
    vocab_size: int = 32000,
    repeats: int = 3,
    only: str | None = None,
    output: Path | None = None,
) -> None:
    """Measure, or with `only` be one of the measured.

    Args:
        peer: checkout of jingyaogong/minimind.
        batch: sequences in the step.
        length: their length.
        vocab_size: of all models.
        repeats: processes of each kind.
        only: one of the kinds: make its steps and print what they needed.
        output: where the JSON goes.
    """
    if only is not None:
        print(json.dumps(measure(only, peer, batch, length, vocab_size)))
        return
    where = environment()
    folder = Path(tempfile.mkdtemp(prefix="memory-benchmark-"))
    found: dict[str, list[float]] = {kind: [] for kind in KINDS}
    losses: list[float] = []
    try:
        reference = Peer.copied(peer, folder / "peer")
        for _ in range(repeats):
            for kind in KINDS:
                shape = [f"--batch={batch}", f"--length={length}", f"--vocab-size={vocab_size}"]
                command = [sys.executable, __file__, "--only", kind, f"--peer={reference.folder}", *shape]
                done = subprocess.run(command, env={**os.environ, **core_threads()}, capture_output=True, text=True)
                if done.returncode:
                    raise SystemExit(f"{kind} failed:\n{done.stderr.strip()[-800:]}")
                result = json.loads(done.stdout.strip().splitlines()[-1])
                found[kind].append(result["bytes"] / 2**20)
                losses += [result["loss_error"]] if "loss_error" in result else []
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    title = f"step memory, {batch} x {length}, vocabulary {vocab_size}"
    claims = [Claim(f"{title}: {kind}", tuple(values), unit="MiB") for kind, values in found.items()]
    for kind in ("ours fp32", "ours bf16"):
        shares = ratios(found[kind], found["minimind"])
        claims.append(Claim(f"{title}: {kind} over minimind", shares, 0.6, at_least=False, unit="x"))
    claims.append(Claim("loss beside the plain cross-entropy", tuple(losses), 1e-5, at_least=False, unit="relative"))
    report(__file__, where, claims, {"mebibytes": found}, output)


def measure(kind: str, peer: Path, batch: int, length: int, vocab_size: int) -> dict[str, float]:
    """Bytes that weights, optimizer and two steps need beyond the imports."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    build = {"minimind": build_minimind, "Qwen3": build_qwen3}.get(kind, build_ours)
    make = build(peer, vocab_size)
    tokens = torch.randint(3, vocab_size, (batch, length), generator=torch.Generator().manual_seed(0)).to(device)
    torch.ones(8, 8) @ torch.ones(8, 8)  # what the first product allocates belongs to no model
    before = resident_peak(device)
    torch.manual_seed(0)
    model: Any = make().to(device)
    if kind == "ours bf16":
        model = model.bfloat16()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        if kind.startswith("ours"):
            loss = model(tokens[:, :-1], tokens[:, 1:]).loss
        else:
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del loss
    result = {"bytes": resident_peak(device) - before}
    if kind == "ours fp32":
        result["loss_error"] = loss_error(model, tokens)
    return result


def loss_error(model: Any, tokens: Any) -> float:
    """How far our loss is from float64's over whole logits, relative."""
    import torch

    with torch.no_grad():
        ours = model(tokens[:, :-1], tokens[:, 1:]).loss.double()
        logits = model(tokens[:, :-1]).logits.double()
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return float((ours - exact).abs() / exact)


def build_ours(_peer: Path, vocab_size: int) -> Any:
    """What makes our minimind3."""
    import dataclasses

    from minimind.config import preset
    from minimind.model import MiniMindForCausalLM

    config = dataclasses.replace(preset("minimind3"), vocab_size=vocab_size)
    return lambda: MiniMindForCausalLM(config)


def build_minimind(peer: Path, vocab_size: int) -> Any:
    """What makes the reference's model of the same shape."""
    sys.path.insert(0, str(peer))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    return lambda: MiniMindForCausalLM(MiniMindConfig(vocab_size=vocab_size))


def build_qwen3(_peer: Path, vocab_size: int) -> Any:
    """What makes transformers' Qwen3 of the same shape."""
    from padded_loop import build_qwen3 as build

    return lambda: build("minimind3", vocab_size)


def resident_peak(device: Any) -> int:
    """Bytes: the most that this process has held until now."""
    from minimind.metrics import peak_memory_bytes

    return peak_memory_bytes(device)


if __name__ == "__main__":
    tyro.cli(main)
