"""What can be proven on the machine at hand, by real runs of training: `python -m minimind.doctor --prove`.

Equality means: the losses and gradient norms of a small model beside those of the same model on the CPU, in float32 and
without kernels.
"""

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from minimind.accelerator import computes_bf16, count_devices, default_device, device_name
from minimind.checkpoints.folder import list_checkpoints, step_of
from minimind.config.run_config import Precision, RunConfig
from minimind.errors import UserError, first_line
from minimind.files import disk_errors
from minimind.model.kernels.matmul import has_fast_matmul
from minimind.parallel.compilation import settle_compilation
from minimind.reports.doctor.finding import Finding, describe_machine, without_names, write_proof
from minimind.reports.doctor.proof_runs import KINDS, SAVED_STEP, STEPS, ProofRuns, SmallRun
from minimind.reports.plan.memory import estimate_memory
from minimind.training.peak_flops import data_sheet_peak
from minimind.training.record.events import read_events
from minimind.training.record.run_files import StepRecord

BOUNDS: dict[Precision, dict[str, float]] = {
    "fp32": {"loss": 1e-4, "grad_norm": 1e-3},
    "bf16": {"loss": 1e-2, "grad_norm": 5e-2},
    "fp16": {"loss": 2e-3, "grad_norm": 1e-2},
}
"""Largest relative difference in a step."""
STAGES = (1, 2, 3)
MEMORY_BOUND = 1.2

Proof = tuple[dict[str, float], dict[str, float], str]
"""Figures, bounds, a note."""


def prove(minutes: float, output: Path) -> int:
    """Run every check, print a line for each and write the files; gives the exit code: 1 unless something is proven and
    nothing fails."""
    date, began, device = time.strftime("%Y-%m-%d"), time.monotonic(), default_device()
    with disk_errors(output):
        output.mkdir(parents=True, exist_ok=True)
    machine = describe_machine(device)
    print(f"proving {machine['device']}, at most {minutes:g} minutes", flush=True)
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        prover = Prover(ProofRuns(device, Path(folder), began + 60 * minutes))
        prover.prove_all()
    with disk_errors(output):
        write_proof(output, machine, prover.findings, date, time.monotonic() - began)
    print(f"wrote {output / 'prove.json'} and {output / 'prove.md'}: no names of hosts, persons or folders are in them")
    statuses = {finding.status for finding in prover.findings}
    return int("failed" in statuses or "passed" not in statuses)


class Prover:
    """Makes the checks one after another; `findings` are those so far."""

    def __init__(self, runs: ProofRuns) -> None:
        self.runs = runs
        self.findings: list[Finding] = []
        self.on_cpu = runs.device.type == "cpu"
        self._large: tuple[str, RunConfig, list[StepRecord]] | None = None

    def prove_all(self) -> None:
        """Every check, the most telling first."""
        dense, num_devices = SmallRun("dense"), count_devices()
        self.check_equal("dense, fp32", dense)
        self.check("resume", self.resume)
        self.check("speed", self.speed)
        self.check("memory", self.memory)
        precisions = self.find_precisions()
        for kind in KINDS:
            for precision in precisions:
                if (run := SmallRun(kind, precision)) != dense:
                    self.check_equal(f"{kind}, {precision}", run)
        compiles, words = settle_compilation("auto", self.runs.device.type)
        if compiles:
            self.check_equal(f"compiled, {precisions[1]}", SmallRun("dense", precisions[1], compile="on"))
        else:
            self.add(Finding("compiled", "skipped", note=words))
        for stage in STAGES if self.on_cpu or num_devices > 1 else ():
            self.check_equal(f"ZeRO {stage}, two ranks", SmallRun("dense", ranks=2, stage=stage), dense)
        if not self.on_cpu and num_devices == 1:
            self.add(Finding("two ranks", "skipped", note="one device"))

    def find_precisions(self) -> list[Precision]:
        """Those that the device itself computes in; the others are skipped."""
        device, found = self.runs.device, list[Precision](["fp32"])
        if has_fast_matmul(torch.bfloat16) if self.on_cpu else computes_bf16(device):
            found.append("bf16")
        else:
            self.add(Finding("bf16", "skipped", note="this device would compute it in float32 and round"))
        if self.on_cpu:
            self.add(Finding("fp16", "skipped", note="no training in it on a CPU"))
        else:
            found.append("fp16")
        return found

    def add(self, finding: Finding) -> None:
        """Print a finding and keep it."""
        print(f"  {finding.name:<20} {finding}", flush=True)
        self.findings.append(finding)

    def check(self, name: str, prove: Callable[[], Proof], *, ranks: int = 1) -> None:
        """Prove it if there is time; what a run dies of is a failure."""
        if time.monotonic() + 1.5 * ranks * self.runs.longest > self.runs.deadline:
            self.add(Finding(name, "skipped", note="no time left; give more --minutes"))
            return
        print(f"  {name} ...", end="\r", flush=True)
        try:
            figures, bounds, note = prove()
            is_good = all(figures[key] <= bound for key, bound in bounds.items())
            self.add(Finding(name, "passed" if is_good else "failed", figures, bounds, note))
        except Exception as error:  # libraries of other devices fail in many ways, and the next checks may pass
            self.add(Finding(name, "failed", note=without_names(first_line(error))))

    def check_equal(self, name: str, run: SmallRun, other: SmallRun | None = None) -> None:
        """Compare a run with another, by default the plain model on the CPU."""

        def prove() -> Proof:
            expected = self.runs.small(other or SmallRun(run.kind, on_cpu=True))
            return compare(self.runs.small(run), expected), BOUNDS[run.precision], ""

        self.check(name, prove, ranks=run.ranks)

    def resume(self) -> Proof:
        """Continued from a checkpoint as after a crash: the figures of the run that went through, bit for bit."""
        whole, run = self.runs.small(SmallRun("dense")), self.runs.config_of(SmallRun("dense"))
        for checkpoint in list_checkpoints(Path(run.train.run_dir)):
            if step_of(checkpoint) > SAVED_STEP:
                shutil.rmtree(checkpoint)
        difference = compare(self.runs.train(run), whole)
        events = read_events(Path(run.train.run_dir))
        if not any(event.event == "resume" and event.step == SAVED_STEP for event in events):
            raise UserError(f"the run did not go on from its checkpoint of step {SAVED_STEP}")
        bounds, note = dict.fromkeys(difference, 0.0), f"from step {SAVED_STEP} of {STEPS}"
        if any(difference.values()):  # some devices add in another order each time
            bounds = compare(self.runs.small(SmallRun("dense", number=2)), whole)
            note += "; the bound is what two whole runs differ by" if any(bounds.values()) else ""
        return difference, bounds, note

    def speed(self) -> Proof:
        """Tokens a second and MFU of the largest size that fits."""
        self._large = name, run, records = self.runs.large()
        train = self.runs.resolve(run).train
        sheet = data_sheet_peak(device_name(self.runs.device), half=train.precision != "fp32")
        figures = {
            "tokens_per_second": statistics.median(record["tokens_per_second"] or 0.0 for record in records),
            "mfu": statistics.median(record["mfu"] or 0.0 for record in records),
        }
        note = f"{name} in {train.precision}, {train.micro_batch_size} x {run.data.seq_len} tokens a step; peak by "
        return figures, {"mfu": 1.0} if sheet else {}, note + (f"the data sheet of {sheet[1]}" if sheet else "a matmul")

    def memory(self) -> Proof:
        """The peak of that size beside the plan."""
        if self._large is None:
            raise UserError("needs the run that measures the speed")
        name, run, records = self._large
        measured = self.runs.resident(run) if self.on_cpu else records[-1]["peak_memory_bytes"]
        planned = estimate_memory(self.runs.resolve(run), self.runs.device.type).total
        figures = {"measured_bytes": measured, "planned_bytes": planned, "measured_over_planned": measured / planned}
        return figures, {"measured_over_planned": MEMORY_BOUND}, name


def compare(found: Sequence[StepRecord], expected: Sequence[StepRecord]) -> dict[str, float]:
    """Largest relative difference of losses and of gradient norms.

    Raises:
        UserError: a step is missing, or a figure is not finite.
    """
    if not [record["step"] for record in found] == [record["step"] for record in expected] == list(range(1, STEPS + 1)):
        raise UserError(f"{len(found)} and {len(expected)} steps are recorded instead of {STEPS}")
    differences = {"loss": 0.0, "grad_norm": 0.0}
    for here, there in zip(found, expected, strict=True):
        for key in differences:
            one, other = here.get(key), there.get(key)
            if not isinstance(one, float) or not isinstance(other, float):
                raise UserError(f"step {here['step']}: {key} is {one}, and should be {other}")
            differences[key] = max(differences[key], abs(one - other) / abs(other))
    return differences
