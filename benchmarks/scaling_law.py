"""A scaling law fitted on small runs, and its word on the next size beside what was found.

    python benchmarks/scaling_law.py --shards DIR [--widths 64 96 128 192 256] [--steps 400] [--seeds 1]
        [--precision bf16]

Each width is one run at a constant rate, evaluated on the way; the last is predicted from the others. What is written
serves `python -m minimind.plan --compute-optimal BUDGET --law FILE`.
"""

import dataclasses
import itertools
import sys
from pathlib import Path

import numpy as np
import tyro
from harness import OUT, Claim, report, train_evaluated

from minimind.config.run_config import preset
from minimind.reports.plan.scaling_law import fit_law

SEQ_LEN, WINDOWS = 256, 8


def main(
    shards: Path, widths: tuple[int, ...] = (64, 96, 128, 192, 256), steps: int = 400, evaluations: int = 8,
    seeds: tuple[int, ...] = (1,), precision: str = "fp32", folder: Path = OUT / "scaling_law",
) -> None:  # fmt: skip
    points: dict[int, list[tuple[float, int, float]]] = {}
    every = steps // evaluations
    for width, seed in itertools.product(widths, seeds):
        size = dataclasses.replace(preset("quickstart"), hidden_size=width).flops_per_token(SEQ_LEN) / 6
        flags = ["--hidden-size", width, "--seq-len", SEQ_LEN, "--global-batch-size", WINDOWS, "--schedule", "constant"]
        flags += ["--precision", precision, "--steps", steps, "--eval-every", every]
        flags += ["--seed", seed, "--shards", shards.resolve()]
        found = train_evaluated("quickstart", folder / f"{width}-{steps}-{seed}", *flags)
        points.setdefault(width, []).extend((size, n * SEQ_LEN * WINDOWS, bits) for n, bits in found if n > every)
        print(f"  width {width}, seed {seed}: {found[-1][1]:.4f}", file=sys.stderr, flush=True)
    *small, largest = sorted(points)
    law = fit_law(np.array([point for width in small for point in points[width]]))
    size, tokens, bits = points[largest][-1]
    wrong = [abs(law(*point[:2]) / point[2] - 1) for point in points[largest]]
    claims = [
        Claim(f"loss of width {largest} at its end, found", [bits], unit="bits a byte"),
        Claim("the same, predicted from the smaller", [law(size, tokens)], unit="bits a byte"),
        Claim("error of the prediction along its run", wrong, 0.02, at_least=False, unit="of the loss"),
    ]
    law = fit_law(np.array([point for found in points.values() for point in found]))
    report(__file__, claims, {"points": points, "law": law._asdict()})


if __name__ == "__main__":
    tyro.cli(main)
