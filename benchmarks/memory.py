"""Peak memory of a training step beside the reference's: same batch, vocabulary 32000, AdamW.

python benchmarks/memory.py --peer DIR [--batch 32] [--length 340] [--vocab-size 32000]
"""

import dataclasses
import sys
from pathlib import Path
from typing import Any, Literal, get_args

import tyro
from harness import Claim, build_engine, core_threads, engine_step, joined, ratios, report, run, workspace
from turns import Peer

MARK = "measured: "
Kind = Literal["minimind", "ours fp32", "ours bf16", "ours bf16 compiled"]


def main(
    peer: Path, batch: int = 32, length: int = 340, vocab_size: int = 32000, repeats: int = 1,
    kinds: tuple[Kind, ...] = get_args(Kind), only: str | None = None,
) -> None:  # fmt: skip
    """Measure, or with `only` be one of the measured.

    Args:
        batch: sequences in the step; 32 is the reference's own default.
        kinds: what is measured; minimind always is.
        only: one of the kinds: make its steps and print what they needed; or "loss": check that of ours.
    """
    if only is not None:
        print(f"{MARK}{measure(only, peer, batch, length, vocab_size)}")
        return
    with workspace() as folder:
        shape = [f"--batch={batch}", f"--length={length}", f"--vocab-size={vocab_size}"]
        shape.append(f"--peer={Peer.copied(peer, folder / 'peer').folder}")
        chosen = [kind for kind in get_args(Kind) if kind in ("minimind", *kinds)]
        found = {kind: [run_alone(kind, shape) / 2**20 for _ in range(repeats)] for kind in chosen}
        error = run_alone("loss", shape)
    title = f"step memory, {batch} x {length}, vocabulary {vocab_size}"
    claims = [Claim(f"{title}: {kind}", values, unit="MiB") for kind, values in found.items()]
    for kind in [kind for kind in kinds if kind.startswith("ours")]:
        shares, goal = ratios(found[kind], found["minimind"]), 0.6 if kind == "ours bf16" else None
        claims.append(Claim(f"{title}: {kind} over minimind", shares, goal, at_least=False, unit="x"))
    claims.append(Claim("loss beside the plain cross-entropy", (error,), 1e-5, at_least=False, unit="relative"))
    report(__file__, claims, {"mebibytes": found})


def config_of(vocab_size: int) -> Any:
    """minimind3 with another vocabulary."""
    from minimind.model.presets import PRESETS

    return dataclasses.replace(PRESETS["minimind3"], vocab_size=vocab_size)


def run_alone(kind: str, shape: list[str]) -> float:
    """What a process of its own measures."""
    output = run([sys.executable, __file__, "--only", kind, *shape], Path.cwd(), **core_threads())
    (line,) = [line for line in output.splitlines() if line.startswith(MARK)]
    return float(line.removeprefix(MARK))


def measure(kind: str, peer: Path, batch: int, length: int, vocab_size: int) -> float:
    """Bytes that weights, optimizer and two steps need beyond the imports, or the relative error of our loss."""
    import torch

    from minimind.training.step_record import peak_memory_bytes

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = torch.randint(3, vocab_size, (batch, length + 1), generator=torch.Generator().manual_seed(0)).to(device)
    if kind == "loss":
        return loss_error(tokens[:2], vocab_size)
    if kind.startswith("ours"):
        return measure_ours(kind, tokens, vocab_size)
    sys.path.insert(0, str(peer))
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    before = peak_memory_bytes(device)
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=vocab_size)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(tokens[:, :length], labels=tokens[:, :length]).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del loss
    return peak_memory_bytes(device) - before


def measure_ours(kind: str, tokens: Any, vocab_size: int) -> int:
    """The same of ours."""
    import minimind.parallel.engine  # noqa: F401 - imports do not count
    from minimind.training.step_record import peak_memory_bytes

    run = {
        "seq_len": tokens.shape[1] - 1,
        "micro_batch_size": tokens.shape[0],
        "compile": "on" if "compiled" in kind else "off",
    }
    run["precision"] = "fp32" if "fp32" in kind else "bf16"
    with workspace() as folder, joined() as (env, device):
        before = peak_memory_bytes(device)
        engine = build_engine(config_of(vocab_size), env, device, run_dir=str(folder), **run)
        step = engine_step([tokens[:, :-1].contiguous()], *engine)
        step()
        step()
        return peak_memory_bytes(device) - before


def loss_error(tokens: Any, vocab_size: int) -> float:
    """How far the loss of our fresh model is from float64's over all logits, relative."""
    import torch

    from minimind.model import MiniMindForCausalLM
    from minimind.model.kernels.apply import apply_kernels

    torch.manual_seed(0)
    with torch.no_grad():
        model = MiniMindForCausalLM(config_of(vocab_size)).to(tokens.device)
        apply_kernels(model, tokens.device)
        ours = model(tokens[:, :-1], tokens[:, 1:]).loss.double()
        logits = model(tokens[:, :-1]).logits.double()
        exact = torch.nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
    return float((ours - exact).abs() / exact)


if __name__ == "__main__":
    tyro.cli(main)
