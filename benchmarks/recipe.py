"""What was learnt for the tokens seen, recipe against recipe: quickstart's model, the same text, several seeds.

    python benchmarks/recipe.py --shards DIR [--steps 300] [--seeds 1 2 3] [--only NAME ...]

Each run is `python -m minimind.train` with the flags of its recipe; the figure is bits a byte over the whole validation
split at the end. Seconds are not compared: steps of all recipes see the same number of tokens. What is there already in
`--folder` is read, not run again.
"""

import json
import statistics
import sys
from pathlib import Path

import tyro
from harness import OUT, ROOT, Claim, report, run

SHAPE = "--model quickstart --seq-len 256 --global-batch-size 8 --no-tensorboard --save-every 0"
MUON = "--optimizer muon --lr 1e-2 --muon-lr 0.02"
RECIPES = {
    "adamw": "--lr 3e-3",
    "muon": MUON,
    "muon, linear to zero": f"{MUON} --schedule linear --min-lr-ratio 0",
    "muon, wsd to zero over half": f"{MUON} --schedule wsd --decay-ratio 0.5 --min-lr-ratio 0",
    "muon, cosine to zero": f"{MUON} --min-lr-ratio 0",
    "muon 0.01": "--optimizer muon --lr 1e-2 --muon-lr 0.01",
    "muon 0.04": "--optimizer muon --lr 1e-2 --muon-lr 0.04",
    "muon, rest at 3e-3": "--optimizer muon --lr 3e-3 --muon-lr 0.02",
    "muon, rest at 2e-2": "--optimizer muon --lr 2e-2 --muon-lr 0.02",
    "muon, no decay": f"{MUON} --weight-decay 0",
    "muon, half the batch, twice the steps": f"{MUON} --global-batch-size 4",
}


def main(
    shards: Path, steps: int = 300, seeds: tuple[int, ...] = (1, 2, 3), only: tuple[str, ...] = (),
    folder: Path = OUT / "recipe",
) -> None:  # fmt: skip
    """Measure.

    Args:
        steps: of 2,048 tokens.
        only: recipes, by name.
    """
    found: dict[str, list[float]] = {}
    for seed in seeds:
        for name in only or RECIPES:
            found.setdefault(name, []).append(bits_per_byte(name, shards, steps, seed, folder))
            print(f"  seed {seed}  {found[name][-1]:.4f}  {name}", file=sys.stderr, flush=True)
    order = sorted(found, key=lambda name: statistics.mean(found[name]))
    claims = [Claim(name, found[name], note=f"mean {statistics.mean(found[name]):.3f}") for name in order]
    report(__file__, claims, {"steps": steps, "seeds": seeds, "bits_per_byte": found, "flags": RECIPES})


def bits_per_byte(name: str, shards: Path, steps: int, seed: int, folder: Path) -> float:
    """Of one run, over the whole validation split after its last step."""
    flags = f"{SHAPE} {RECIPES[name]}".split()
    batch = int(flags[len(flags) - flags[::-1].index("--global-batch-size")])
    run_dir = folder / f"{name.replace(' ', '_')}-{steps}-{seed}"
    command = [sys.executable, "-m", "minimind.train", *flags, "--shards", shards, "--run-dir", run_dir]
    run([*command, "--steps", steps * 8 // batch, "--seed", seed], ROOT)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    return [record["eval_bits_per_byte"] for record in records if "eval_bits_per_byte" in record][-1]


if __name__ == "__main__":
    tyro.cli(main)
