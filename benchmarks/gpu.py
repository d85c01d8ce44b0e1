"""What `gpu.sh` needs besides the other benchmarks: the rates of the device itself, and the page of all figures.

python benchmarks/gpu.py                    # products, copies, with several ranks also collectives
python benchmarks/gpu.py --page FILE.md     # from what lies in $BENCHMARKS_OUT
"""

import functools
import json
import os
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import tyro
from harness import OUT, Claim, environment, format_table, joined, report, time_rounds

from minimind.accelerator import default_device, has_streams
from minimind.parallel.compilation import find_missing_compiler
from minimind.training.peak_flops import data_sheet_peak

REHEARSAL = "**A rehearsal on a simulated GPU: no figure below was measured on a GPU, and none means anything.**"


def main(megabytes: int = 256, size: int = 8192, rounds: int = 5, page: Path | None = None) -> None:
    """Measure the device, or write the page.

    Args:
        megabytes: how much is copied and reduced.
        size: of the products' matrices.
    """
    if page is not None:
        write_page(page)
        return
    with joined() as (env, device):
        claims = measure_products(device, size, rounds)
        claims += measure_transfers(device, megabytes << 20, rounds, env.world_size)
        if env.is_first:
            report(f"device_{env.world_size}", claims, {})


def measure_products(device: torch.device, size: int, rounds: int) -> list[Claim]:
    """Square products beside the data sheet's peak."""
    claims = []
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
        seconds = time_rounds({"product": functools.partial(torch.matmul, left, right)}, rounds)["product"]
        sheet = data_sheet_peak(environment()["device"], half=dtype != torch.float32)
        note = f"{sheet[0] / 1e12:,.0f} by the data sheet of {sheet[1]}" if sheet else ""
        title = f"product of {size} x {size} in {str(dtype).removeprefix('torch.')}"
        claims.append(Claim(title, [2e-12 * size**3 / taken for taken in seconds], unit="TFLOP/s", note=note))
    return claims


def measure_transfers(device: torch.device, size: int, rounds: int, ranks: int) -> list[Claim]:
    """From pinned memory and back, on the device, which reads and writes, and what each rank of a ring sends."""
    pinned = torch.empty(size, dtype=torch.uint8, pin_memory=has_streams(device))
    here, there = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    ways: dict[str, tuple[float, Callable[[], Any]]] = {
        "copy to the device": (1, lambda: here.copy_(pinned, non_blocking=True)),
        "copy to the host": (1, lambda: pinned.copy_(here, non_blocking=True)),
        "copy on the device": (2, lambda: there.copy_(here)),
    }
    if ranks > 1:
        shares, numbers = 2 * (ranks - 1) / ranks, there.view(torch.bfloat16)
        ways[f"all-reduce over {ranks} ranks, a rank"] = (shares, lambda: torch.distributed.all_reduce(numbers))
    return [
        Claim(way, [ways[way][0] * size / 1e9 / taken for taken in seconds], unit="GB/s")
        for way, seconds in time_rounds({way: move for way, (_, move) in ways.items()}, rounds).items()
    ]


def read_tests(path: Path) -> list[dict[str, Any]]:
    """The tests of pytest's own report: name, outcome, seconds, figures."""
    found = []
    for case in ElementTree.parse(path).iter("testcase") if path.exists() else []:
        outcome = next((kind for kind in ("failure", "error", "skipped") if case.find(kind) is not None), "passed")
        figures = {one.get("name"): one.get("value") for one in case.iter("property")}
        found.append({"test": case.get("name"), "outcome": outcome, "seconds": case.get("time"), **figures})
    return found


def write_page(page: Path) -> None:
    """The page, and beside it one JSON with all of it."""
    tests, is_rehearsal = read_tests(OUT / "tests.xml"), "SIMULATED_DEVICE" in os.environ
    scripts = [json.loads(path.read_text()) for path in sorted(OUT.glob("*.json")) if path != page.with_suffix(".json")]
    failed, missing = (OUT / "failed.txt").read_text().splitlines(), find_missing_compiler(default_device().type)
    content = {"rehearsal": is_rehearsal, "environment": environment(), "failed": failed, "tests": tests}
    page.with_suffix(".json").write_text(json.dumps({**content, "scripts": scripts}, indent=1) + "\n")
    verdicts = [row["passed"] for script in scripts for row in script["claims"] if row["target"] is not None]
    ran = [test["outcome"] == "passed" for test in tests if test["outcome"] != "skipped"]
    lines = ["# One machine with GPUs\n", *[f"{REHEARSAL}\n"] * is_rehearsal]
    lines.append(f"`bash benchmarks/gpu.sh`, {time.strftime('%Y-%m-%d')}. {sum(verdicts)} of {len(verdicts)} targets")
    lines[-1] += f" reached; {sum(ran)} of {len(ran)} tests passed.\n"
    lines += [f"- failed or not run: {line}" for line in failed]
    lines += [f"- not measured compiled: {missing} is missing"] if missing else []
    for script in scripts:
        where, table = script["environment"], format_table(script["claims"])
        lines.append(f"\n## {script['script']}\n\n{where['date']}; {where['machine']}\n\n{table}")
    lines += ["\n## Tests\n", "| Test | | Figures |", "|---|---|---|"]
    for test in tests:
        figures = "; ".join(f"{name} {value}" for name, value in list(test.items())[3:])
        lines.append(f"| {test['test']} | {test['outcome']} | {figures} |")
    page.write_text("\n".join(lines) + "\n")
    print(f"wrote {page} and {page.with_suffix('.json')}")


if __name__ == "__main__":
    tyro.cli(main)
