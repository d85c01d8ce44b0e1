"""Short runs on simulated devices, and the same on a CPU: what the matrices of tests/simulated_cuda compare."""

from collections.abc import Callable, Iterator
from pathlib import Path

from repository import ROOT
from simulated_device import Machine
from simulated_ranks import SimulatedRanks, simulated_ranks
from training_runs import EXPERTS, flags_for, losses, train

KINDS: dict[str, dict] = {"dense": {}, "experts": EXPERTS, "documents": {"document_mask": True}}
# Relative, of three losses. A CPU has no fp16: those are compared with its float32, from which they differ by the
# rounding of weights and activations to 11 bits, 2^-12 each; bf16 has 8, and rounds on both sides.
TOLERANCE = {"fp32": 1e-5, "bf16": 2e-3, "fp16": 5e-4}

Reference = Callable[[str, str, str], dict[int, float]]


def matrix_flags(corpus: Path, folder: Path, file: str, kind: str, precision: str, **others: object) -> list[str]:
    """A run of three steps by a file of ds_configs/."""
    settings = {"steps": 3, "save_every": 0, "eval_every": 0, "lr": 5e-4, "precision": precision, **KINDS[kind]}
    return flags_for(corpus, folder, ds_config=ROOT / "ds_configs" / f"{file}.json", **{**settings, **others})


def run(
    ranks: SimulatedRanks, corpus: Path, folder: Path, file: str, kind: str, precision: str, **others: object
) -> tuple[str, dict[int, float]]:
    """What a run of `matrix_flags` prints, and its losses."""
    flags = matrix_flags(corpus, folder, file, kind, precision, **others)
    (code, printed), *_ = ranks.run(train, flags)
    assert code == 0
    return printed, losses(folder)


def cpu_reference(corpus: Path, make_folder: Callable[[str], Path]) -> Iterator[Reference]:
    """For a fixture: the losses of a CPU. They are the same at every stage, so made once for each optimizer, kind and
    precision."""
    made: dict[tuple[bool, str, str], dict[int, float]] = {}
    ranks = simulated_ranks(1, Machine(devices=0))
    one_cpu = next(ranks)

    def get(file: str, kind: str, precision: str) -> dict[int, float]:
        key = ("muon" in file, kind, precision.replace("fp16", "fp32"))
        if key not in made:
            folder = make_folder("cpu")
            made[key] = run(one_cpu, corpus, folder, "zero2_muon" if key[0] else "zero1", *key[1:])[1]
        return made[key]

    yield get
    next(ranks, None)
