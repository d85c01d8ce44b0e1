"""What was learnt for the tokens seen, recipe against recipe: quickstart's model, the same text, several seeds.

    python benchmarks/recipe.py --shards DIR [--model quickstart] [--steps 300] [--seeds 1 2 3] [--only NAME ...]

Each run is `python -m minimind.train` with the flags of its recipe; the figure is bits a byte over the whole validation
split after its last step. Seconds are not compared. What `--folder` has already is not run again.
"""

import statistics
import sys
from pathlib import Path

import tyro
from harness import OUT, Claim, report, train_evaluated

SHAPE = "--seq-len 256 --global-batch-size 8"  # 2,048 tokens a step
MUON = "--optimizer muon --lr 1e-2 --muon-lr 0.02"
RECIPES = {
    "adamw": "--optimizer adamw --lr 3e-3",
    "muon": MUON,
    "muon, linear to zero": f"{MUON} --schedule linear --min-lr-ratio 0",
    "muon, wsd to zero": f"{MUON} --schedule wsd --decay-ratio 0.4 --min-lr-ratio 0",
    "muon 0.01": f"{MUON} --muon-lr 0.01",
    "muon 0.04": f"{MUON} --muon-lr 0.04",
    "muon, the rest at 3e-3": f"{MUON} --lr 3e-3",
    "muon, the rest at 3e-2": f"{MUON} --lr 3e-2",
    "muon, no decay": f"{MUON} --weight-decay 0",
}


def main(
    shards: Path, model: str = "quickstart", steps: int = 300, seeds: tuple[int, ...] = (1, 2, 3),
    only: tuple[str, ...] = (), folder: Path = OUT / "recipe",
) -> None:  # fmt: skip
    found: dict[str, list[float]] = {name: [] for name in only or RECIPES}
    for seed in seeds:
        for name, figures in found.items():
            run_dir = folder / f"{model}-{steps}-{name.replace(' ', '_')}-{seed}"
            flags = [*SHAPE.split(), "--steps", steps, *RECIPES[name].split(), "--seed", seed, "--shards", shards]
            figures.append(train_evaluated(model, run_dir, *flags)[-1][1])
            print(f"  {model}, seed {seed}: {figures[-1]:.4f}  {name}", file=sys.stderr, flush=True)
    claims = [Claim(name, figures) for name, figures in found.items()]
    claims.sort(key=lambda claim: statistics.mean(claim.values))
    report(__file__, claims, {"model": model, "steps": steps, "seeds": seeds, "bits": found, "flags": RECIPES})


if __name__ == "__main__":
    tyro.cli(main)
