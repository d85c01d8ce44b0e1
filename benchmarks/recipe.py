"""What was learnt for the tokens seen, recipe against recipe: quickstart's model, the same text, several seeds.

    python benchmarks/recipe.py --shards DIR [--model quickstart] [--steps 300] [--seq-len 256] [--seeds 1 2 3]

Each run is `python -m minimind.train` with the flags of its recipe; the figure is bits a byte over the whole validation
split after its last step. Seconds are not compared. What `--folder` has already is not run again.
"""

import statistics
import sys
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
    "embedding and output at a third": "--lr {low} --norm-lr 1e-2",
    "embedding and output at three times": "--lr {high} --norm-lr 1e-2",
    "norms at a third": "--norm-lr 3.3e-3",
    "linear to zero": "--schedule linear --min-lr-ratio 0",
    "cosine to zero": "--min-lr-ratio 0",
    "wsd to zero": "--schedule wsd --decay-ratio 0.4 --min-lr-ratio 0",
    "warm-up of 10%": "--warmup-steps {tenth}",
    "no decay": "--weight-decay 0",
    "z-loss": "--z-loss-coef 1e-4",
    "half the batch, twice the steps": "--global-batch-size 4 --steps {twice}",
    "document mask": "--document-mask",
    "beta1 0.9": "--betas 0.9 0.95",
}
"""Flags beside the defaults: a third and three times the rate that would be, a tenth and twice the steps."""


def main(
    shards: Path, model: str = "quickstart", steps: int = 300, seeds: tuple[int, ...] = (1, 2, 3),
    seq_len: int = 256, only: tuple[str, ...] = (), folder: Path = OUT / "recipe",
) -> None:  # fmt: skip
    rate = default_rates(preset(model), None)["lr"]
    given = {"low": rate / 3, "high": 3 * rate, "tenth": steps // 10, "twice": 2 * steps}
    found: dict[str, list[float]] = {name: [] for name in only or RECIPES}
    for seed in seeds:
        for name, figures in found.items():
            run_dir = folder / f"{model}-{seq_len}-{steps}-{name.replace(' ', '_')}-{seed}"
            flags = ["--seq-len", seq_len, "--global-batch-size", 8, "--steps", steps]
            flags += RECIPES[name].format(**given).split()
            flags += ["--seed", seed, "--shards", shards]
            figures.append(train_evaluated(model, run_dir, *flags)[-1][1])
            print(f"  {model}, seed {seed}: {figures[-1]:.4f}  {name}", file=sys.stderr, flush=True)
    claims = [Claim(name, figures) for name, figures in found.items()]
    claims.sort(key=lambda claim: statistics.mean(claim.values))
    report(__file__, claims, {"model": model, "steps": steps, "seeds": seeds, "bits": found, "flags": RECIPES})


if __name__ == "__main__":
    tyro.cli(main)
