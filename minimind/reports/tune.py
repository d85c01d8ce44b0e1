"""The learning rate and the batch of a run, found by short runs of the one trainer on equal tokens.

Each run is `minimind.train` in a child process, in a folder that is gone afterwards. Rates are tried a factor of four
apart until the best stands between two worse ones, then a factor of two; then comes a second seed, then other batches.
"""

import dataclasses
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure

from minimind.config.run_config import RunConfig
from minimind.errors import UserError
from minimind.reports.plan.child_run import train_in_child
from minimind.reports.run.charts import STYLES, to_png
from minimind.training.record.run_files import evaluations_of, steps_of
from minimind.units import format_table

PLANNED_RUNS = 12
RATES = ("lr", "muon_lr", "embedding_lr", "norm_lr")
PILOT_STEPS, FEWEST_STEPS = 5, 20
EVALUATION_SAMPLES = 256
"""Validation samples after a run, where `eval_samples` says nothing; the same for all, so they can be compared."""


class Trial(NamedTuple):
    """One run; its rates are those of the start times 2 to the power of `doublings`."""

    doublings: int
    batch: int
    seed: int
    loss: float
    """Held out, in nats a token; infinite where the run broke off."""


@dataclasses.dataclass
class Tuner:
    """Runs trials until a moment; the first `run` with its own rates is the middle of the search."""

    run: RunConfig
    deadline: float
    trials: list[Trial] = dataclasses.field(default_factory=list)
    steps: int = PILOT_STEPS
    longest: float = 0.0
    """Seconds of the longest trial."""

    def search(self) -> None:
        """Rates, seeds and batches as far as the time goes.

        Raises:
            UserError: a run fails otherwise than by its rate, or the time is too short for comparable ones.
        """
        self._measure()
        batch, seed = self.batch, self.run.train.seed
        self.try_run(0, batch, seed)
        for apart in (2, 1):
            while self.has_time():
                best, tried = self.best(batch), {trial.doublings for trial in self.trials}
                around = (best.doublings + apart, best.doublings - apart) if best.loss < math.inf else (min(tried) - 2,)
                missing = [new for new in around if new not in tried]
                if not missing:
                    break
                self.try_run(missing[0], batch, seed)
        if math.isinf(self.best().loss):
            lowest = self.rates(min(trial.doublings for trial in self.trials))
            raise UserError(f"every run broke off, down to {describe_rates(lowest)}: begin with a lower --lr")
        start = self.best(batch).doublings
        others = [(start, batch, seed + 1), (start, 2 * batch, seed), (start + 1, 2 * batch, seed)]
        others += [(start, batch // 2, seed), (start - 1, batch // 2, seed)] if batch % 2 == 0 else []
        for other in others:
            if self.has_time():
                self.try_run(*other)

    def has_time(self) -> bool:
        """Whether a run as long as the longest would end in time."""
        return time.perf_counter() + self.longest <= self.deadline

    def best(self, batch: int | None = None) -> Trial:
        """The lowest loss, of one batch or of all, of the first seed."""
        known = [trial for trial in self.trials if trial.seed == self.run.train.seed and batch in (None, trial.batch)]
        return min(known, key=lambda trial: trial.loss)

    def noise(self) -> float | None:
        """How far two seeds of one setting lie apart; None without a second."""
        second = [trial for trial in self.trials if trial.seed != self.run.train.seed]
        first = [trial for trial in self.trials if second and trial[:2] == second[0][:2]]
        return abs(first[0].loss - first[1].loss) if len(first) == 2 else None

    def rates(self, doublings: int) -> dict[str, float]:
        """`lr`, and with Muon the others, which move with it."""
        rates = {name: getattr(self.run.train, name) for name in RATES}
        return {name: float(f"{rate * 2.0**doublings:.3g}") for name, rate in rates.items() if rate is not None}

    @property
    def batch(self) -> int:
        """The batch of the start."""
        assert self.run.train.global_batch_size is not None
        return self.run.train.global_batch_size

    def to_dicts(self) -> list[dict[str, Any]]:
        """The trials for a JSON file; the loss of one that broke off is null."""
        return [
            {**self.rates(t.doublings), "batch": t.batch, "seed": t.seed, "loss": t.loss if t.loss < math.inf else None}
            for t in self.trials
        ]

    def try_run(self, doublings: int, batch: int, seed: int) -> None:
        """One run on the tokens of all others."""
        began = time.perf_counter()
        train, steps = self.run.train, round(self.steps * self.batch / batch)
        assert isinstance(train.micro_batch_size, int)
        micro = math.gcd(train.micro_batch_size, batch)
        fields: dict[str, Any] = {
            "global_batch_size": batch,
            "micro_batch_size": micro,
            "gradient_accumulation_steps": None,
        }
        with tempfile.TemporaryDirectory() as folder:
            records = self._train(Path(folder), seed=seed, steps=max(1, steps), **fields, **self.rates(doublings))
        found = [record["eval_loss"] for record in evaluations_of(records)]
        loss = math.inf if not found or found[-1] is None else found[-1]
        self.trials.append(Trial(doublings, batch, seed, loss))
        self.longest = max(self.longest, time.perf_counter() - began)
        print(f"  {describe_rates(self.rates(doublings))}, batch {batch}, seed {seed}: {_loss(loss)}", flush=True)

    def _measure(self) -> None:
        """A short run: what the defaults come to, and how many steps a trial may have."""
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as folder:
            records = self._train(Path(folder), steps=PILOT_STEPS)
            if not evaluations_of(records):
                raise UserError("--shards: no validation split to compare by; prepare them with --val-fraction above 0")
            content = json.loads((Path(folder) / "run" / "run_config.json").read_text())
        found = RunConfig.from_dict({name: content[name] for name in ("model", "data", "train")}).train
        ended = time.perf_counter()
        step = statistics.median(record["step_seconds"] or math.inf for record in steps_of(records))
        left = (self.deadline - ended) / PLANNED_RUNS - (ended - began - PILOT_STEPS * step)
        self.steps = min(math.floor(left / step), self.run.train.steps or sys.maxsize)
        if left < FEWEST_STEPS * step:
            needed = ended - began + PLANNED_RUNS * (FEWEST_STEPS * step + ended - began)
            raise UserError(
                f"--minutes: too short for {PLANNED_RUNS} runs of {FEWEST_STEPS} steps of {step:.2g} s; give at least "
                f"{math.ceil(needed / 60)}, or a smaller model"
            )
        own = self.run.train
        # What was left to the defaults is left to them but for what is searched.
        names = (*RATES, "optimizer", "micro_batch_size", "global_batch_size", "warmup_steps")
        kept: dict[str, Any] = {name: getattr(found, name) for name in names[:-1]} | {names[-1]: own.warmup_steps}
        self.run = dataclasses.replace(self.run, train=dataclasses.replace(own, **kept))

    def _train(self, folder: Path, **fields: Any) -> list[Any]:
        """The records of a run of these settings; of one that broke off by its rate, those until then."""
        train: dict[str, Any] = {
            "eval_every": 0,
            "save_every": 0,
            "tensorboard": False,
            "resume": "never",
            "wandb_project": None,
        }
        train |= {"run_dir": str(folder / "run")}
        train["eval_samples"] = self.run.train.eval_samples or EVALUATION_SAMPLES
        run = dataclasses.replace(self.run, train=dataclasses.replace(self.run.train, **train, **fields))
        child = train_in_child(run, folder)
        if child.code and not (child.records and "nothing of it was saved" in child.said):
            raise UserError(child.error())
        return child.records


def _loss(loss: float) -> str:
    return f"{loss:.4f}" if math.isfinite(loss) else "broke off"


def describe_rates(rates: dict[str, float]) -> str:
    """As flags."""
    return " ".join(f"--{name.replace('_', '-')} {rate:g}" for name, rate in rates.items())


def show_trials(tuner: Tuner) -> str:
    """The table, the recommendation, and what it does not say."""
    first, noise = tuner.best(), tuner.noise()
    trials = sorted(tuner.trials, key=lambda trial: (trial.batch, trial.doublings, trial.seed))
    rows = [["rate", "batch", "seed", "held-out loss", ""]]
    for trial in trials:
        mark = "*" if trial is first else ""
        rows.append([describe_rates(tuner.rates(trial.doublings)), *map(str, trial[1:3]), _loss(trial.loss), mark])
    alike = [t.doublings for t in trials if t.batch == first.batch and t.loss - first.loss <= (noise or 0.0)]
    tried = [trial.doublings for trial in trials if trial.batch == first.batch]
    tokens = tuner.steps * tuner.batch * tuner.run.data.seq_len
    lines = [
        format_table(rows, "<>>>"),
        "",
        f"take      {describe_rates(tuner.rates(first.doublings))} --global-batch-size {first.batch}",
        f"bounds    {tokens:,} tokens a run; the rate is known to a factor of 2 at best"
        + ("" if noise is None else f"; two seeds lie {noise:.4f} apart"),
    ]
    if noise is not None and len({*alike}) > 1:
        named = ", ".join(describe_rates(tuner.rates(doublings)) for doublings in sorted({*alike}))
        lines.append(f"          no worse than that: {named}")
    if first.doublings in (min(tried), max(tried)):
        lines.append("          the best is at the edge of what was tried: give more --minutes, or begin there")
    if noise is None:
        lines.append("          no time for a second seed: how much of a difference is chance is not known")
    lines.append("          a longer run wants the same rate or a lower one, and bears a larger batch")
    return "\n".join(lines)


def draw_trials(tuner: Tuner) -> bytes:
    """A PNG: held-out loss over the rate, a curve for each batch."""
    figure = Figure(figsize=(5.4, 3.5), layout="constrained")
    axes = figure.add_subplot()
    axes.set_xscale("log", base=2)
    axes.set_xlabel("lr" if len(tuner.rates(0)) == 1 else "lr (muon_lr in proportion)")
    axes.set_ylabel("held-out loss, nats a token")
    for number, batch in enumerate(sorted({trial.batch for trial in tuner.trials})):
        colour, dashes, marker, _ = STYLES[number % len(STYLES)]
        points = sorted((tuner.rates(t.doublings)["lr"], t.loss) for t in tuner.trials if t.batch == batch)
        rates, losses = zip(*points, strict=True)
        axes.plot(rates, losses, color=colour, linestyle=dashes, marker=marker, label=f"batch {batch}")
    axes.legend(frameon=False)
    return to_png(figure)
