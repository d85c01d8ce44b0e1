"""The training runs of a proof: a small model on tokens that are made here, and the largest size that fits.

Each is `minimind.train` in a process of its own. All files lie in one folder, which the caller removes.
"""

import dataclasses
import json
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import psutil
import torch

from minimind.accelerator import computes_bf16, device_module
from minimind.config.deepspeed_file import load_ds_config
from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import CompileMode, DataConfig, Precision, RunConfig, TrainConfig
from minimind.data.shard_writer import write_random_tokens
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM
from minimind.model.config import ModelConfig
from minimind.model.kernels.apply import VARIABLE
from minimind.model.presets import PRESETS
from minimind.reports.plan.child_run import train_in_child
from minimind.reports.plan.memory import estimate_memory
from minimind.training.record.run_files import StepRecord, steps_of

# Weights large enough that rounding seldom gives a token another expert.
_SMALL: dict[str, Any] = {"vocab_size": 512, "hidden_size": 128, "num_hidden_layers": 2, "initializer_range": 0.1}
KINDS: dict[str, tuple[ModelConfig, bool]] = {
    "dense": (dataclasses.replace(PRESETS["tiny"], **_SMALL), False),
    "experts": (dataclasses.replace(PRESETS["tiny-moe"], **_SMALL), False),
    "document mask": (dataclasses.replace(PRESETS["tiny"], **_SMALL), True),
}
"""Small models, and whether documents are masked."""
STEPS, SAVED_STEP = 6, 3
SIZES = ("large", "medium", "minimind3", "small", "minimind2-small", "quickstart", "tiny")
CPU_SEQ_LEN, SEQ_LEN = 512, 2048
WARM_UP_STEPS, LAST_TIMED_STEP, FEWEST_STEPS = 5, 30, 10
USABLE_MEMORY, USABLE_TIME, LIKELY_MFU = 0.5, 0.4, 0.25
"""What a large run may take of the free memory and of the time that is left, and its guessed speed."""
GIVE_BACK = {"MALLOC_MMAP_THRESHOLD_": "65536"}
"""glibc's malloc then returns what is freed; training leaves such a setting alone."""


class SmallRun(NamedTuple):
    """A run of a small model; the reference is `on_cpu`, where it has no kernels."""

    kind: str
    precision: Precision = "fp32"
    on_cpu: bool = False
    ranks: int = 1
    stage: int = 1
    compile: CompileMode = "off"
    number: int = 1
    """Another one makes the run again."""


@dataclass
class ProofRuns:
    """Runs on `device` until `deadline`, a moment of `time.monotonic`."""

    device: torch.device
    folder: Path
    deadline: float
    longest: float = 0.0
    """Seconds of the longest small run, for each rank."""
    _made: dict[SmallRun, list[StepRecord]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self._started = time.monotonic()
        for kind, (model, _) in KINDS.items():
            torch.manual_seed(0)
            # Another device would draw other weights from the seed.
            MiniMindForCausalLM(model).save_pretrained(self.folder / f"{kind} weights")
        write_random_tokens(self.folder / "tokens", _SMALL["vocab_size"], 20_000, document_tokens=50)

    def small(self, small: SmallRun) -> list[StepRecord]:
        """The steps of a small run, which is made once."""
        if small not in self._made:
            began, variables = time.monotonic(), {VARIABLE: "plain"} if small.on_cpu else {}
            try:
                self._made[small] = self.train(self.config_of(small), ranks=small.ranks, variables=variables)
            except UserError as error:
                raise UserError(f"the plain model on the CPU: {error}" if small.on_cpu else str(error)) from None
            self.longest = max(self.longest, (time.monotonic() - began) / small.ranks)
        return self._made[small]

    def config_of(self, small: SmallRun) -> RunConfig:
        """The settings of a small run."""
        model, document_mask = KINDS[small.kind]
        ds_config = self.folder / f"zero{small.stage}.json"
        ds_config.write_text(json.dumps({"zero_optimization": {"stage": small.stage}}))
        train = TrainConfig(
            run_dir=str(self.folder / " ".join(map(str, small))), ds_config=str(ds_config),
            device="cpu" if small.on_cpu else "auto", precision=small.precision,
            init_from=str(self.folder / f"{small.kind} weights"), optimizer="adamw", lr=2e-3, warmup_steps=1,
            steps=STEPS, save_every=SAVED_STEP, micro_batch_size=2, global_batch_size=8, log_every=1, tensorboard=False,
            compile=small.compile,
        )  # fmt: skip
        return RunConfig(
            model, DataConfig(str(self.folder / "tokens"), seq_len=128, document_mask=document_mask), train
        )

    def train(
        self,
        run: RunConfig,
        *,
        ranks: int = 1,
        variables: Mapping[str, str] | None = None,
        steps: int = sys.maxsize,
        seconds: float | None = None,
    ) -> list[StepRecord]:
        """The steps of a run, which is ended after `steps`, and after `seconds` however many there are.

        Raises:
            UserError: the run failed, or hangs.
        """
        limit = seconds or min(self.deadline - time.monotonic(), (self.deadline - self._started) / 3)
        child = train_in_child(
            run, self.folder, ranks=ranks, variables=variables, seconds=limit,
            is_enough=lambda records: len(steps_of(records)) >= steps,
        )  # fmt: skip
        records = steps_of(child.records)
        if child.code:
            raise UserError(child.error())
        if child.code is None and seconds is None and len(records) < steps:
            raise UserError(f"no end after {limit:.0f} s")
        return records

    def resolve(self, run: RunConfig) -> ResolvedRun:
        """As the training does on one process."""
        bf16 = self.device.type != "cpu" and computes_bf16(self.device)
        ds = load_ds_config(run.train.ds_config)
        return resolve_run(run, ds, world_size=1, device_type=self.device.type, bf16_supported=bf16)

    def large(self) -> tuple[str, RunConfig, list[StepRecord]]:
        """The largest preset whose plan fits half of the free memory and whose steps fit the time: its name, its
        settings, and its steps after the first, which compile."""
        seconds = USABLE_TIME * (self.deadline - time.monotonic())
        last = self.small(SmallRun("dense"))[-1]  # which knows the peak
        flops = self.resolve(self.config_of(SmallRun("dense"))).flops_per_token
        peak = (last["tokens_per_second"] or 0.0) * flops / (last["mfu"] or math.inf)
        on_cpu = self.device.type == "cpu"
        free = psutil.virtual_memory().available if on_cpu else device_module(self.device).mem_get_info(self.device)[0]
        for name in SIZES:
            run = self._large_run(name, CPU_SEQ_LEN if on_cpu else SEQ_LEN)
            resolved = self.resolve(run)
            tokens = LAST_TIMED_STEP * resolved.train.global_batch_size * resolved.data.seq_len
            is_fast = tokens * resolved.flops_per_token <= LIKELY_MFU * peak * seconds
            if is_fast and estimate_memory(resolved, self.device.type).total <= USABLE_MEMORY * free:
                break
        else:
            raise UserError(f"not even {SIZES[-1]} fits {seconds:.0f} s and the free memory; give more --minutes")
        write_random_tokens(Path(str(run.data.shards)), run.model.vocab_size, 64 * run.data.seq_len)
        records = self.train(run, steps=LAST_TIMED_STEP, seconds=seconds)
        if len(records) < WARM_UP_STEPS + FEWEST_STEPS:
            raise UserError(f"{name}: {len(records)} steps in {seconds:.0f} s; give more --minutes")
        return name, run, records[WARM_UP_STEPS:]

    def resident(self, run: RunConfig) -> int:
        """Most memory that a run holds on a CPU, without what every run holds, which a small one and its plan tell.
        Freed memory goes back to the system in both."""
        small, peaks = self.config_of(SmallRun("dense")), []
        for one in (small, run):
            train = dataclasses.replace(one.train, run_dir=f"{one.train.run_dir} memory", log_every=1)
            records = self.train(dataclasses.replace(one, train=train), steps=3, variables=GIVE_BACK)
            peaks.append(records[-1]["peak_memory_bytes"])
        return peaks[1] - peaks[0] + estimate_memory(self.resolve(small), "cpu").total

    def _large_run(self, name: str, seq_len: int) -> RunConfig:
        model = PRESETS[name]
        model = dataclasses.replace(model, max_position_embeddings=max(seq_len, model.max_position_embeddings))
        train = TrainConfig(run_dir=str(self.folder / name), steps=10_000, log_every=5, tensorboard=False)
        return RunConfig(model, DataConfig(str(self.folder / f"{name} tokens"), seq_len=seq_len), train)
