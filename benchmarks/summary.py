"""One table of everything that the other benchmarks wrote: claim, target, measured, share of the target, pass or not.

    python benchmarks/summary.py [--folder benchmarks/out]

Claims with a target come first; `--all` adds the figures that nothing was promised for. Measures nothing.
"""

import json
from pathlib import Path

import tyro
from measure import OUT, format_table


def main(folder: Path = OUT, all: bool = False) -> None:
    """Print the table.

    Args:
        folder: where the JSON files of the benchmarks lie.
        all: also the figures without a target.
    """
    rows, machines = [], set()
    for path in sorted(folder.glob("*.json")):
        content = json.loads(path.read_text())
        if "claims" not in content:
            continue
        where = content["environment"]
        versions = ", ".join(f"{name} {version}" for name, version in where["versions"].items())
        machines.add(f"{where['cores']} cores, {where['cpu']}, {where['device']}; {versions}")
        rows += content["claims"]
    promised = [row for row in rows if row["target"] is not None]
    for machine in sorted(machines):
        print(machine)
    print(format_table(promised))
    print(f"{sum(row['passed'] for row in promised)} of {len(promised)} reached")
    if all:
        print()
        print(format_table([row for row in rows if row["target"] is None]))


if __name__ == "__main__":
    tyro.cli(main)
