"""A training step, each setting in a process of its own: speed and MFU, memory beside the plan's, waits of the host,
shares of its parts, and how long a save holds it up; or memory alone, of ranks that share long sequences or layers.

python benchmarks/step.py [--models minimind3 large] [--seq-len 2048] [--launcher "torchrun --nproc-per-node 8"]
python benchmarks/step.py --sp-sizes 1 2 4 --tp-sizes 2 --seq-len 32768
"""

import contextlib
import dataclasses
import itertools
import json
import os
import shlex
import sys
import time
import unittest.mock
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import Claim, core_threads, joined, report, resolve, run, workspace

from minimind.accelerator import default_device, synchronize
from minimind.checkpoints.manifest import TrainState
from minimind.checkpoints.run_state import DataFingerprint
from minimind.checkpoints.saving import CheckpointSaver
from minimind.config.run_config import DTYPE_NAMES, Precision, preset
from minimind.data.dataset import TokenDataset
from minimind.data.shards import open_split
from minimind.distributed.collectives import broadcast_object, gather_objects
from minimind.distributed.environment import read_environment
from minimind.distributed.process_group import process_group
from minimind.parallel.compilation import find_missing_compiler
from minimind.reports.plan import trial
from minimind.reports.plan.memory import estimate_memory, largest_micro_batch
from minimind.training.peak_flops import peak_flops
from minimind.training.profiler import PARTS, sum_parts
from minimind.training.setup import make_loader

WAYS: dict[str, dict[str, Any]] = {
    "plain": {"compile": "off"}, "documents": {"compile": "off", "document_mask": True}, "compiled": {"compile": "on"},
    "compiled, documents": {"compile": "on", "document_mask": True},
    "without kernels": {"compile": "off", "kernels": "plain"},
}  # fmt: skip
MFU = {"minimind3": 0.40, "medium": 0.45, "large": 0.50}  # on one H100 or H200, compiled, 2048 tokens
LARGEST_MICRO_BATCH = 32
SHORT = 256
WARM_UP, COUNTED = 5, 3  # at most so many steps before the clock; so many whose waits, and whose parts, are counted


def main(
    models: tuple[str, ...] = ("minimind3",), seq_len: int = 2048, micro_batch_size: int | None = None,
    steps: int = 20, precision: Precision = "bf16", stage: int = 1, ways: tuple[str, ...] = tuple(WAYS),
    launcher: str = shlex.quote(sys.executable), vocab_size: int = 6400, peer: Path | None = None,
    sp_sizes: tuple[int, ...] = (), tp_sizes: tuple[int, ...] = (), name: str = "step", only: str | None = None,
) -> None:  # fmt: skip
    """Measure, or with `only` be one of the measured.

    Args:
        micro_batch_size: sequences [default: as many as the plan says fit, at most 32].
        ways: of WAYS; documents: under the document mask.
        launcher: what starts the ranks of a setting, as a shell would split it.
        peer: a checkout of jingyaogong/minimind, whose memory at the same batch is measured too.
        sp_sizes, tp_sizes: measure only the memory of so many CPU ranks that share a sequence, or the layers.
        name: of the JSON.
    """
    if only is not None:
        setting = json.loads(only)
        work = measure_reference if "peer" in setting else measure_shared if "sizes" in setting else measure
        print(*([json.dumps(found)] if (found := work(**setting)) else []), flush=True)
        return
    claims, measured = [], {}
    sharing = [*(("sp_size", size) for size in sp_sizes), *(("tp_size", size) for size in tp_sizes)]
    for model, (kind, ranks) in itertools.product(models, sharing):
        title = f"{model}, {seq_len} tokens, {kind} {ranks}: peak of a rank"
        command = [sys.executable, "-m", "minimind.distributed.launchers.local", str(ranks)]
        found = run_alone(command, {"model": model, "seq_len": seq_len, "sizes": {kind: ranks}})
        measured[title], planned = found, found["planned"] / 2**30
        claims.append(Claim(title, [peak / 2**30 for peak in found["peaks"]], unit="GiB", note=f"plan {planned:.3g}"))
    if sharing:
        return report("memory_of_ranks", claims, measured)
    shape = {"seq_len": seq_len, "micro": micro_batch_size, "vocab_size": vocab_size}
    for model, way in itertools.product(models, ways):
        missing = find_missing_compiler(default_device().type)
        if missing and WAYS[way]["compile"] == "on":
            print(f"{model}, {way}: not measured, {missing} is missing", file=sys.stderr)
            continue
        setting = {"model": model, "precision": precision, "stage": stage, "steps": steps, **shape, **WAYS[way]}
        found = run_alone(shlex.split(launcher), setting)
        title = f"{model}, {precision}, ZeRO {stage}, {way}, {found['ranks']} x {found['micro_batch_size']} x {seq_len}"
        measured[title] = found
        claims += judge(title, found, MFU.get(model) if way == "compiled" and seq_len == 2048 else None)
    theirs = run_alone([sys.executable], {"peer": str(peer.resolve()), **shape}) if peer is not None else None
    for title, found in measured.items() if theirs else ():
        goal = 0.6 if precision == "bf16" and "plain" in title else None
        share = found["memory"] / theirs["memory"]
        claims.append(Claim(f"{title}: memory over minimind's", (share,), goal, at_least=False, unit="x"))
    report(name, claims, measured)


def run_alone(launcher: Sequence[str], setting: dict[str, Any]) -> dict[str, Any]:
    """What the first rank of processes of their own has measured."""
    env = {**core_threads(), "MINIMIND_KERNELS": setting.pop("kernels", os.environ.get("MINIMIND_KERNELS", "all"))}
    output = run([*launcher, __file__, "--only", json.dumps(setting)], **env)
    return json.loads(next(line for line in output.splitlines() if line.startswith('{"')))


def judge(title: str, found: dict[str, Any], mfu: float | None) -> list[Claim]:
    """The lines of one setting."""
    claims = [
        Claim(f"{title}: speed", (found["tokens_per_second"],), unit="tokens/s"),
        Claim(f"{title}: MFU", (found["mfu"],), mfu, note=found["peak"]),
        Claim(f"{title}: waiting for data", (found["data_share"],), 0.01, at_least=False, unit="of a step"),
        Claim(f"{title}: peak of memory over the plan's", (found["memory"] / found["planned"],), 1.1, at_least=False),
        Claim(f"{title}: waits of the host", (found["waits"],), unit="a step", note="DeepSpeed's and ours"),
        Claim(f"{title}: a save's pause", (found["pause"],), 0.5, at_least=False, unit="s"),
    ]
    shares = found["shares"].items()
    return claims + [Claim(f"{title}: share of {part}", (share,), unit="of a step") for part, share in shares]


def measure(model: str, vocab_size: int, seq_len: int, micro: int | None, steps: int, **setting: Any) -> Any:
    """Train one setting; what was found, on the first rank. Every rank calls this."""
    config = dataclasses.replace(preset(model), vocab_size=vocab_size)
    with workspace() as own, joined() as (env, device):
        setting |= {"run_dir": broadcast_object(str(own)), "seq_len": seq_len}
        setting |= {"steps": 10**6, "keep_last": 1, "seed": 0}
        if micro is None:
            limit = int(0.9 * torch.cuda.mem_get_info()[0]) if device.type == "cuda" else 0
            alone = resolve(config, env, device, **setting, micro_batch_size=1)
            largest = min(largest_micro_batch(alone, limit, device.type), LARGEST_MICRO_BATCH)
            micro = 2 ** (max(1, largest).bit_length() - 1)
        resolved = resolve(config, env, device, **setting, micro_batch_size=micro)
        base, counted, waited = trial.held_bytes(device), min(steps, COUNTED), 0.0
        trainer = trial.make_trainer(resolved, env, device, own)
        batches = trainer.loader.iterate(0)

        def step() -> None:
            nonlocal waited
            began = time.perf_counter()
            given = next(batches)
            waited += time.perf_counter() - began
            trainer.train_step(given)

        def seconds(count: int) -> float:
            began = time.perf_counter()
            for _ in range(count):
                step()
            synchronize(device)
            return (time.perf_counter() - began) / count

        seconds(min(steps, WARM_UP))
        waited = 0.0
        taken = seconds(steps)
        data_share, tokens = waited / steps / taken, resolved.train.global_batch_size * seq_len
        peak, source = peak_flops(device, getattr(torch, DTYPE_NAMES[resolved.train.precision]))
        found = {
            "ranks": env.world_size, "micro_batch_size": micro, "step_seconds": taken,
            "tokens_per_second": tokens / taken, "data_share": data_share,
            "mfu": tokens / taken * config.flops_per_token(seq_len) / peak / env.world_size,
            "peak": f"of {peak / 1e12:,.3g} TFLOP/s a device, {source}",
            "memory": trial.peak_bytes(device) - base, "planned": estimate_memory(resolved, device.type).total,
            "waits": count_waits(lambda: seconds(counted)) / counted,
            "shares": shares_of_parts(lambda: seconds(counted)),
            **time_save(trainer, step),
        }  # fmt: skip
        batches.close()
        trainer.engine.destroy()
        return found if env.is_first else None


def measure_reference(peer: str, vocab_size: int, seq_len: int, micro: int) -> dict[str, int]:
    """Bytes that the reference's weights, AdamW and two steps need: in float32 on a CPU, as in its loop, on a GPU under
    bf16 autocast."""
    sys.path.insert(0, peer)
    from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

    device = default_device()
    before = trial.held_bytes(device)
    tokens = torch.randint(3, vocab_size, (micro, seq_len)).to(device)
    model = MiniMindForCausalLM(MiniMindConfig(vocab_size=vocab_size)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for _ in range(2):
        with torch.autocast("cuda", dtype=torch.bfloat16, enabled=device.type == "cuda"):
            loss = model(tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        del loss
    return {"memory": trial.peak_bytes(device) - before}


def measure_shared(model: str, seq_len: int, sizes: dict[str, int]) -> Any:
    """Bytes of each rank beyond what it held before the model, at the peak of a step of one window: float32, ZeRO 1,
    documents masked, blocks recomputed. The step before, which makes the optimizer's states, is of a short window.
    Every rank calls this."""
    torch.set_num_threads(1)
    env, device = read_environment(), torch.device("cpu")
    trial.return_freed_memory()
    with process_group(env, device), workspace() as own:
        setting = {"document_mask": True, "activation_checkpointing": True, "precision": "fp32", **sizes}
        setting |= {"seq_len": seq_len, "micro_batch_size": 1, "global_batch_size": 1, "steps": 10}
        resolved = resolve(preset(model), env, device, **setting)
        base = trial.held_bytes(device)
        trainer = trial.make_trainer(resolved, env, device, own)
        short = TokenDataset(open_split(own, "train"), SHORT, document_mask=True)
        loader = make_loader(resolved, short, trainer.mesh, TrainState(), pin_memory=False)
        trainer.train_step(loader.step_batches(0))
        trial.reset_peak(device)
        trainer.train_step(trainer.loader.step_batches(0))
        peaks = gather_objects(trial.peak_bytes(device) - base)
        trainer.engine.destroy()
    return {"peaks": peaks, "planned": estimate_memory(resolved, "cpu").total} if env.is_first else None


def count_waits(work: Callable[[], object]) -> int:
    """How often the host waited for the GPU: operators that torch warns of, and waits that are asked for by name, but
    for the one at the end of the work."""
    if not torch.cuda.is_available():
        return 0
    with contextlib.ExitStack() as stack:
        patches = [
            unittest.mock.patch.object(owner, "synchronize", autospec=True, side_effect=owner.synchronize)
            for owner in (torch.cuda, torch.cuda.Stream, torch.cuda.Event)
        ]
        asked = [stack.enter_context(patch) for patch in patches]
        found = stack.enter_context(warnings.catch_warnings(record=True))
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        stack.callback(torch.cuda.set_sync_debug_mode, "default")
        work()
    operators = sum("synchroniz" in str(one.message) for one in found)
    return operators + sum(mock.call_count for mock in asked) - 1


def shares_of_parts(work: Callable[[], object]) -> dict[str, float]:
    """Each part of the steps, as the profiler sees it, of all of them."""
    with torch.profiler.profile(activities=torch.profiler.supported_activities()) as profile:
        work()
    parts = sum_parts(profile.events())
    return {part: spent / sum(parts[name] for name in (*PARTS, "idle")) for part, spent in parts.items()}


def time_save(trainer: Any, step: Callable[[], None]) -> dict[str, float]:
    """Seconds that a save beside training holds up the loop, and until the checkpoint has its name."""
    saver = CheckpointSaver(trainer.engine, trainer.resolved, DataFingerprint("", ""), asynchronous=True)
    with contextlib.closing(saver):
        for _ in range(2):  # the first also allocates the host's copies
            synchronize(default_device())
            began = time.perf_counter()
            saver.start(trainer.state)
            paused = time.perf_counter() - began
            while saver.is_saving:
                step()
                if all(gather_objects(saver.is_idle)):
                    saver.advance()
            total = time.perf_counter() - began
    return {"pause": paused, "saved": total}


if __name__ == "__main__":
    tyro.cli(main)
