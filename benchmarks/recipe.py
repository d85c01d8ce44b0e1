"""What was learnt for the tokens seen, recipe against recipe: quickstart's model, the same text, several seeds.

    python benchmarks/recipe.py --shards DIR [--model quickstart] [--hidden-size 128] [--precision bf16] [--steps 300]
        [--seq-len 256] [--seeds 1 2 3] [--only NAMES]

Each run is `python -m minimind.train` with the flags of its recipe; the figure is bits a byte over the whole validation
split after its last step. Seconds are not compared. What `--folder` has already is not run again.
"""

import statistics
import sys
from dataclasses import replace
from pathlib import Path

import tyro
from harness import OUT, Claim, report, train_evaluated

from minimind.config.muon import default_rates
from minimind.config.run_config import preset

RECIPES = {
    "muon": "",
    "adamw": "--optimizer adamw --lr 3e-3",
    "adamw 1e-2": "--optimizer adamw --lr 1e-2",
    "half the muon rate": "--muon-lr 0.01",
    "twice the muon rate": "--muon-lr 0.04",
    "half the output's rate": "--lr {half} --norm-lr 1e-2",
    "twice the output's rate": "--lr {double} --norm-lr 1e-2",
    "norms at a third": "--norm-lr 3.3e-3",
    "linear to zero": "--schedule linear --min-lr-ratio 0",
    "cosine to zero": "--min-lr-ratio 0",
    "wsd to zero": "--schedule wsd --decay-ratio 0.4 --min-lr-ratio 0",
    "warm-up of 10%": "--warmup-steps {tenth}",
    "no decay": "--weight-decay 0",
    "z-loss": "--z-loss-coef 1e-4",
    "half the batch, twice the steps": "--global-batch-size 4 --steps {twice}",
    "document mask": "--document-mask",
    "whole documents": "--packing whole-documents",
    "beta1 0.9": "--betas 0.9 0.95",
}
"""Flags beside the defaults: half and twice the rate that would be, a tenth and twice the steps."""


def main(
    shards: Path, model: str = "quickstart", steps: int = 300, seeds: tuple[int, ...] = (1, 2, 3),
    seq_len: int = 256, hidden_size: int | None = None, precision: str = "fp32", only: tuple[str, ...] = (),
    folder: Path = OUT / "recipe",
) -> None:  # fmt: skip
    width = hidden_size or preset(model).hidden_size
    rate = default_rates(replace(preset(model), hidden_size=width), None)["lr"]
    given = {"half": rate / 2, "double": 2 * rate, "tenth": steps // 10, "twice": 2 * steps}
    found: dict[str, list[float]] = {name: [] for name in only or RECIPES}
    for seed in seeds:
        for name, figures in found.items():
            run_dir = folder / f"{model}-{width}-{precision}-{seq_len}-{steps}-{name.replace(' ', '_')}-{seed}"
            flags = ["--hidden-size", width, "--precision", precision]
            flags += ["--seq-len", seq_len, "--global-batch-size", 8, "--steps", steps]
            flags += RECIPES[name].format(**given).split()
            flags += ["--seed", seed, "--shards", shards.resolve()]
            figures.append(train_evaluated(model, run_dir, *flags)[-1][1])
            print(f"  {model}, width {width}, seed {seed}: {figures[-1]:.4f}  {name}", file=sys.stderr, flush=True)
    claims = [Claim(name, figures) for name, figures in found.items()]
    claims.sort(key=lambda claim: statistics.mean(claim.values))
    measured = {"model": model, "width": width, "steps": steps, "seeds": seeds, "bits": found, "flags": RECIPES}
    report(__file__, claims, measured, OUT / f"recipe-{width}.json")


if __name__ == "__main__":
    tyro.cli(main)
