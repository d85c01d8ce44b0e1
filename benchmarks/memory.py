"""Peak memory of a training step beside the reference's: same batch, vocabulary 32000, AdamW.

    python benchmarks/memory.py --peer DIR [--batch 32] [--length 340] [--vocab-size 32000]

Each step runs in a process of its own, which first imports everything and then counts what it needs on top: the
growth of its peak resident memory on a CPU, the allocator's peak on a GPU. The reference and Qwen3 compute in float32,
as their loops do on a CPU (on a GPU under bf16 autocast); ours is the engine that `minimind.train` builds under ZeRO-1:
in bf16 with float32 master weights, gradients and moments. Ours keeps no full logits and recomputes no activations but
silu(gate) * up.
That its loss is exact is checked in the same run against the plain cross-entropy in float64.
"""

import dataclasses
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

MARK = "measured: "
KINDS = ("minimind", "Qwen3", "ours fp32", "ours bf16", "ours bf16 compiled")


def main(
    peer: Path,
    batch: int = 32,
    length: int = 340,
    vocab_size: int = 32000,
    repeats: int = 1,
    kinds: tuple[str, ...] = KINDS,
    only: str | None = None,
    output: Path | None = None,
) -> None:
    """Measure, or with `only` be one of the measured.

    Args:
        peer: checkout of jingyaogong/minimind.
        batch: sequences in the step; 32 is the reference's own default.
        length: their length.
        vocab_size: of all models.
        repeats: processes of each kind.
        kinds: what is measured; minimind always is.
        only: one of the kinds: make its steps and print what they needed; or "loss": check that of ours.
        output: where the JSON goes.
    """
    if only is not None:
        print(f"{MARK}{measure(only, peer, batch, length, vocab_size)}")
        return
    where = environment()
    if unknown := set(kinds) - set(KINDS):
        raise SystemExit(f"kinds: {', '.join(sorted(unknown))}: not one of {', '.join(KINDS)}")
    kinds = tuple(kind for kind in KINDS if kind in (*kinds, "minimind"))
    folder = Path(tempfile.mkdtemp(prefix="memory-benchmark-"))
    found: dict[str, list[float]] = {kind: [] for kind in kinds}
    try:
        reference = Peer.copied(peer, folder / "peer")
        shape = [f"--peer={reference.folder}", f"--batch={batch}", f"--length={length}", f"--vocab-size={vocab_size}"]
        for _ in range(repeats):
            for kind in kinds:
                found[kind].append(run_alone(kind, shape) / 2**20)
        error = run_alone("loss", shape)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    title = f"step memory, {batch} x {length}, vocabulary {vocab_size}"
    claims = [Claim(f"{title}: {kind}", tuple(values), unit="MiB") for kind, values in found.items()]
    for kind in [kind for kind in kinds if kind.startswith("ours")]:
        shares, goal = ratios(found[kind], found["minimind"]), 0.6 if kind == "ours bf16" else None
        claims.append(Claim(f"{title}: {kind} over minimind", shares, goal, at_least=False, unit="x"))
    claims.append(Claim("loss beside the plain cross-entropy", (error,), 1e-5, at_least=False, unit="relative"))
    report(__file__, where, claims, {"mebibytes": found}, output)


def run_alone(kind: str, shape: list[str]) -> float:
    """What a process of its own measures."""
    command = [sys.executable, __file__, "--only", kind, *shape]
    done = subprocess.run(command, env={**os.environ, **core_threads()}, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{kind} failed:\n{done.stderr.strip()[-800:]}")
    (line,) = [line for line in done.stdout.splitlines() if line.startswith(MARK)]
    return float(line.removeprefix(MARK))


def measure(kind: str, peer: Path, batch: int, length: int, vocab_size: int) -> float:
    """Bytes that weights, optimizer and two steps need beyond the imports, or the relative error of our loss."""
    import torch

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.randint(3, vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    if kind == "loss":
        return loss_error(tokens[:2], vocab_size)
    if kind.startswith("ours"):
        return measure_ours(kind, tokens, vocab_size, device)
    make = {"minimind": build_minimind, "Qwen3": build_qwen3}[kind](peer, vocab_size)
    before = resident_peak(device)
    model = make().to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(tokens[:, :length], labels=tokens[:, :length]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del loss
    return resident_peak(device) - before


def measure_ours(kind: str, tokens: Any, vocab_size: int, device: Any) -> int:
    """The same of ours."""
    from engines import build

    from minimind.config.run_config import preset
    from minimind.distributed.cpu_tuning import keep_freed_memory
    from minimind.distributed.environment import read_environment
    from minimind.distributed.process_group import process_group
    from minimind.parallel.optimizer import optimizer_step

    if device.type == "cpu":
        keep_freed_memory()  # as `minimind.train` does
    config, env = dataclasses.replace(preset("minimind3"), vocab_size=vocab_size), read_environment()
    with tempfile.TemporaryDirectory() as folder, process_group(env, device):
        before = resident_peak(device)
        engine, resolved = build(
            config,
            env,
            device,
            seq_len=tokens.shape[1] - 1,
            run_dir=folder,
            micro_batch_size=tokens.shape[0],
            precision="fp32" if "fp32" in kind else "bf16",
            compile="compiled" in kind,
        )
        for _ in range(2):
            engine.backward(engine(tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()).loss)
            optimizer_step(engine, resolved)
        return resident_peak(device) - before


def loss_error(tokens: Any, vocab_size: int) -> float:
    """How far the loss of our fresh model is from float64's over whole logits, relative."""
    import torch

    from minimind.config.run_config import preset
    from minimind.model import MiniMindForCausalLM

    torch.manual_seed(0)
    with torch.no_grad():
        model = MiniMindForCausalLM(dataclasses.replace(preset("minimind3"), vocab_size=vocab_size)).to(tokens.device)
        ours = model(tokens[:, :-1], tokens[:, 1:]).loss.double()
        logits = model(tokens[:, :-1]).logits.double()
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return float((ours - exact).abs() / exact)


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
    from minimind.training.step_record import peak_memory_bytes

    return peak_memory_bytes(device)


if __name__ == "__main__":
    tyro.cli(main)
