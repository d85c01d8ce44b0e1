"""Kill and corrupt runs at random, and see that none is lost.

    python tests/support/faults.py --kills 200 --corruptions 200          the whole proof, about a quarter of an hour
    python tests/support/faults.py --kills 8 --corruptions 12             what CI runs

    python tests/support/faults.py --kinds dpo ipo orpo simpo kto distill grpo --corruptions 0     other objectives

Tiny runs, dense and with experts under AutoEP (ep size 2 on two ranks), on one and on two ranks, are killed with
SIGKILL (one rank or all) at random moments of training and saving, and while log-probabilities of a reference or a
teacher's tokens are computed before it, and started again, until they end. Their losses
must be, bit for bit, those of a run that nobody killed. Then random files of checkpoints are flipped, cut, emptied,
deleted and swapped: each time the run must name the damage and continue from the older checkpoint, bit for bit again.
Exit code 1 when anything was lost.
"""

import collections
import contextlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parent), str(Path(__file__).resolve().parents[2])]

import tyro  # noqa: E402
from comparison_shards import write_comparisons  # noqa: E402
from structured_corpus import write_corpus  # noqa: E402
from training_runs import EXPERTS, PRELOAD, RankPool, flags_for, losses, train, train_rank  # noqa: E402

from minimind.checkpoints.folder import checkpoints_folder, list_checkpoints, verify_checkpoint  # noqa: E402
from minimind.distributed.launchers.local import find_free_port  # noqa: E402

STEPS = 30
SECONDS_TO_WAIT = 120.0
OBJECTIVES = ("dpo", "ipo", "orpo", "simpo", "kto")
KINDS: dict[str, dict[str, Any]] = {"dense": {}, "experts": EXPERTS, "chat": {"seq_len": 64}}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2}
KINDS |= {"mixture": {}}
KINDS |= {"sequences": {"sp_size": 2, "document_mask": True}}
KINDS |= {"long": {**HEADS, "sp_size": 4, "document_mask": True}}
KINDS |= {"layers": {**HEADS, "attention_dropout": 0.1, "tp_size": 2}}
KINDS |= {"both": {**HEADS, "sp_size": 2, "tp_size": 2, "document_mask": True}}
KINDS |= {name: {"objective": name, "seq_len": 64, "vocab_size": 400, "lr": 1e-2} for name in OBJECTIVES}
KINDS |= {"distill": {"objective": "distill", "teacher_top_k": 4}}
KINDS["grpo"] = {
    "objective": "grpo",
    "seq_len": 64,
    "vocab_size": 400,
    "lr": 1e-2,
    "reward": "comparison_shards:count_letters",
}
KINDS["grpo"] |= {"group_size": 3, "max_new_tokens": 4, "rollout_steps": 3, "reward_workers": 1}
PREPARING = ("windows of train pairs before training", "tokens of the teacher for")
"""What a run says before it computes what lasts from one start to the next."""


@dataclass
class Flags:
    """How much is done to the runs."""

    kills: int = 200
    """Kills, over runs of both kinds on one and on two ranks."""
    corruptions: int = 200
    """Random corruptions."""
    seed: int = 0
    """Of the random moments and places."""
    kinds: tuple[str, ...] = ("dense", "experts")
    """What is killed: dense, experts, sequences or layers (two ranks share each), long (four share sequences), both,
    mixture (of two corpora), chat, or an objective."""
    stage: int = 1
    """ZeRO stage of the runs that are killed."""


@dataclass
class Report:
    """What happened."""

    kills: int = 0
    in_saves: int = 0
    in_preparation: int = 0
    runs: int = 0
    lost: list[str] = field(default_factory=list)
    corruptions: int = 0
    found: int = 0
    continued: int = 0
    harms: collections.Counter[str] = field(default_factory=collections.Counter)


def start(context: Any, flags: list[str], world_size: int, folder: Path) -> list[Any]:
    """Start every rank of a run."""
    port = find_free_port()
    ranks = [
        context.Process(target=train_rank, args=(flags, rank, world_size, port, folder / f"rank{rank}.log"))
        for rank in range(world_size)
    ]
    for process in ranks:
        process.start()
    return ranks


def kill_some(ranks: list[Any], rng: random.Random) -> None:
    """SIGKILL one rank, and the others a moment later (as a launcher does) or at once."""
    order = rng.sample(ranks, len(ranks))
    for process in order:
        with contextlib.suppress(ProcessLookupError):
            os.kill(process.pid, signal.SIGKILL)
        time.sleep(rng.choice([0, 0.05]))
    for process in ranks:
        process.join()


def ended(ranks: list[Any], seconds: float) -> bool:
    """Whether all ranks ended within `seconds`."""
    deadline = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, deadline - time.monotonic()))
    return all(process.exitcode is not None for process in ranks)


def alive_at_random_moment(ranks: list[Any], run_dir: Path, rng: random.Random) -> bool:
    """Wait for a random moment of the start, of what is computed before training, or after a random step; whether the
    run still goes on then."""
    draw, log = rng.random(), run_dir / "rank0.log"
    if draw < 0.1:
        time.sleep(rng.uniform(0, 2))
    elif draw < 0.4 and not last_step(run_dir):
        while not prepares(log) and not last_step(run_dir) and not ended(ranks, 0):
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.2))
    else:
        step = last_step(run_dir) + rng.randint(0, STEPS // 3)
        deadline = time.monotonic() + SECONDS_TO_WAIT
        while last_step(run_dir) <= step and not ended(ranks, 0) and time.monotonic() < deadline:
            time.sleep(0.002)
        time.sleep(rng.uniform(0, 0.05))
    return not ended(ranks, 0)


def prepares(log: Path) -> bool:
    """Whether the last line that a run has printed is one of `PREPARING`."""
    last = log.read_text().strip().rpartition("\n")[2] if log.exists() else ""
    return any(words in last for words in PREPARING)


def last_step(run_dir: Path) -> int:
    """The last step that is in the metrics of a run, also while they are written."""
    path = run_dir / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("\n")), default=0)


def run_to_end(context: Any, flags: list[str], world_size: int, folder: Path) -> str | None:
    """Run without a kill; what went wrong, or None."""
    ranks = start(context, flags, world_size, folder)
    in_time = ended(ranks, SECONDS_TO_WAIT)
    codes = [process.exitcode for process in ranks]
    if not in_time:
        kill_some(ranks, random.Random(0))
    if codes != [0] * world_size:
        return f"exit codes {codes}: {(folder / 'rank0.log').read_text()[-600:]}"
    return None


def kill_runs(context: Any, corpus: Path, folder: Path, flags: Flags, rng: random.Random, report: Report) -> None:
    """Kill runs until there were enough kills; every run is then taken to its end and compared."""
    every = [("experts", 2), ("dense", 1), ("chat", 2), ("dense", 2), ("experts", 1), ("chat", 1)]
    every += [("mixture", 1), ("mixture", 2)]
    every += [(name, ranks) for name in ("sequences", "layers") for ranks in (2, 4)] + [("long", 4), ("both", 4)]
    every += [(name, ranks) for name in (*OBJECTIVES, "distill", "grpo") for ranks in (1, 2)]
    settings = [(kind, world_size) for kind, world_size in every if kind in flags.kinds]
    references: dict[tuple[str, int], dict[int, float]] = {}
    while report.kills < flags.kills:
        kind, world_size = settings[report.runs % len(settings)]
        if (kind, world_size) not in references:
            path = folder / f"reference_{kind}{world_size}"
            path.mkdir()
            wrong = run_to_end(context, command(corpus, path, kind, world_size, flags), world_size, path)
            assert wrong is None, wrong
            references[kind, world_size] = losses(path)
        path = folder / f"run{report.runs}"
        path.mkdir()
        report.runs += 1
        line = command(corpus, path, kind, world_size, flags)
        for _ in range(min(rng.randint(1, 10), flags.kills - report.kills)):
            ranks = start(context, line, world_size, path)
            if not alive_at_random_moment(ranks, path, rng):
                break
            report.in_preparation += prepares(path / "rank0.log")
            kill_some(ranks, rng)
            report.kills += 1
            report.in_saves += any(checkpoints_folder(path).glob("step_*.partial"))
        wrong = run_to_end(context, line, world_size, path)
        if wrong is None and losses(path) != references[kind, world_size]:
            wrong = "other losses than the run that nobody killed"
        if wrong is not None:
            report.lost.append(f"{path.name}, {kind} on {world_size} ranks: {wrong}")
            print(report.lost[-1], flush=True)
        else:
            shutil.rmtree(path)
        print(
            f"{kind}, {world_size} ranks: kills {report.kills}/{flags.kills}, in a save {report.in_saves}, lost "
            f"{len(report.lost)}",
            flush=True,
        )


def command(corpus: Path, run_dir: Path, kind: str, world_size: int, flags: Flags) -> list[str]:
    """A run that saves at every second step."""
    settings = {**KINDS[kind], **({"ep_size": world_size} if kind == "experts" else {})}
    own = {"chat": "chat", "kto": "judged", "grpo": "asked"} | dict.fromkeys(OBJECTIVES[:-1], "pairs")
    if kind == "distill":
        settings["teacher"] = corpus.with_name("teacher")
    if kind == "mixture":
        settings["shards"] = (f"one={corpus}:0.7", f"two={corpus.with_name('other')}:0.3")
    corpus = corpus.with_name(own.get(kind, corpus.name))
    return flags_for(
        corpus, run_dir, stage=flags.stage, steps=STEPS, save_every=2, keep_last=2, dropout=0.1, **settings
    )


def corrupt(folder: Path, rng: random.Random) -> tuple[str, str]:
    """Do one random harm to a checkpoint; gives what it was, and the file."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    path = rng.choice(files)
    content = bytearray(path.read_bytes())
    kind = rng.choice(["flip", "flip", "flip", "truncate", "empty", "delete", "extra", "swap"])
    if kind == "flip":
        content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
        path.write_bytes(content)
    elif kind == "truncate":
        path.write_bytes(content[: rng.randrange(1, len(content))])
    elif kind == "empty":
        path.write_bytes(b"")
    elif kind == "delete":
        path.unlink()
    elif kind == "extra":
        shutil.copyfile(path, folder / "zero_pp_rank_7_mp_rank_00_optim_states.pt")
    else:
        other = rng.choice([item for item in files if item != path])
        data = other.read_bytes()
        other.write_bytes(bytes(content))
        path.write_bytes(data)
    return kind, path.name


# What is corrupted: (kind, ZeRO stage, ranks). Between them they have every kind of file.
CORRUPTED = (("dense", 1, 1), ("dense", 0, 2), ("dense", 3, 2), ("experts", 0, 2), ("experts", 1, 2), ("experts", 3, 2))


def corrupt_runs(corpus: Path, folder: Path, flags: Flags, rng: random.Random, report: Report) -> None:
    """Damage the newest of two checkpoints, again and again; the run must say so and go on from the older one."""
    pools = {size: RankPool(size) for size in (1, 2)}
    try:
        for number, (kind, stage, size) in enumerate(CORRUPTED):
            path = folder / f"corrupted{number}"
            settings = {**KINDS[kind], **({"ep_size": size} if kind == "experts" else {})}
            settings |= {"stage": stage, "save_every": 2, "keep_last": 0, "warmup_steps": 1, "schedule": "constant"}
            for name, steps in (("whole", 6), ("cut", 4)):
                pools[size].run(train, flags_for(corpus, path / name, steps=steps, **settings))
            line = flags_for(corpus, path / "again", steps=6, **settings)
            for _ in range(number, flags.corruptions, len(CORRUPTED)):
                corrupt_once(pools[size], line, path, rng, report)
            print(
                f"{kind}, stage {stage}, {size} ranks: corruptions {report.corruptions}, found {report.found}",
                flush=True,
            )
    finally:
        for pool in pools.values():
            pool.close()


def corrupt_once(pool: RankPool, line: list[str], path: Path, rng: random.Random, report: Report) -> None:
    """One random harm, and the run after it."""
    again = path / "again"
    shutil.rmtree(again, ignore_errors=True)
    shutil.copytree(path / "cut", again)
    harm, file = corrupt(list_checkpoints(again)[-1], rng)
    report.corruptions += 1
    report.harms[harm] += 1
    report.harms[re.sub(r"\d+", "N", file)] += 1
    wrong, printed = None, ""
    try:
        printed = pool.run(train, line)[0][1]
    except Exception as error:
        wrong = repr(error)
    report.found += "skipped" in printed and "step_00000004" in printed
    if wrong is None and (losses(again) != losses(path / "whole") or "at step 2" not in printed):
        wrong = "other losses"
    if wrong is None:
        verify_checkpoint(list_checkpoints(again)[-1])
        report.continued += 1
    else:
        report.lost.append(f"{path.name}: {harm} {file}: {wrong}")
        print(report.lost[-1], flush=True)


def main() -> int:
    """Do all of it and print the counts."""
    flags = tyro.cli(Flags)
    rng = random.Random(flags.seed)
    report = Report()
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        corpus = write_corpus(folder / "corpus", tokens=6000)
        write_corpus(folder / "other", tokens=3000)
        write_corpus(folder / "chat", tokens=6000, chat_template="{{ messages[0].content }}")
        if {"distill", "grpo", *OBJECTIVES} & set(flags.kinds):
            write_comparisons(folder)
            train(flags_for(corpus, folder / "teacher", num_hidden_layers=2, steps=4))
        if flags.kills:
            kill_runs(context, corpus, folder, flags, rng, report)
        if flags.corruptions:
            corrupt_runs(corpus, folder, flags, rng, report)
    print(", ".join(f"{name} {count}" for name, count in sorted(report.harms.items())))
    print(
        f"{report.kills} kills ({report.in_saves} in a save, {report.in_preparation} before training) over "
        f"{report.runs} runs; "
        f"{report.corruptions} corruptions, {report.found} found, {report.continued} continued from the older "
        f"checkpoint; lost: {len(report.lost)}; {time.monotonic() - began:.0f} s"
    )
    return 1 if report.lost or report.found != report.corruptions else 0


if __name__ == "__main__":
    sys.exit(main())
