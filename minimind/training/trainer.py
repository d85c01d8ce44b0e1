"""The loop: batches in, optimizer steps, evaluations, checkpoints, records out.

The loss of a step is the sum over all ranks and micro-batches divided by the number of targets of the whole step, and
so is its gradient. The host waits for the device only on steps that evaluate or save: on CUDA the figures of a step are
logged when they have arrived, a step or more later.
"""

import contextlib
import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from minimind.checkpoints.folder import step_of
from minimind.checkpoints.loading import engine_probe_loss, prove_resumable
from minimind.checkpoints.manifest import TrainState
from minimind.checkpoints.saving import CheckpointSaver
from minimind.config.expert_parallel import uses_random_routing
from minimind.config.resolved_run import ResolvedRun
from minimind.data.dataset import Dataset
from minimind.data.loader import Batch, BatchLoader, DeviceCopy
from minimind.data.manifest import ShardError
from minimind.distributed.collectives import all_reduce_ints
from minimind.distributed.stop_requests import Requests
from minimind.errors import UnmadeStep, UserError
from minimind.inference.evaluation import measure_loss
from minimind.parallel.loss_scale import loss_scale
from minimind.parallel.mesh import Mesh
from minimind.parallel.optimizer import optimizer_step, set_learning_rate
from minimind.training import expert_balance
from minimind.training.control import RunControl
from minimind.training.lr_schedule import learning_rate
from minimind.training.objectives.objective import Objective
from minimind.training.profiler import StepProfiler
from minimind.training.record.metrics import NullRecord
from minimind.training.step_record import Figures, PendingStep, StepSums, describe_evaluation
from minimind.training.step_timer import StepTimer

if TYPE_CHECKING:
    import deepspeed


class BadStepError(UserError):
    """A step's loss or gradient was NaN or infinite."""


@dataclass
class Trainer:
    """One run on one rank."""

    resolved: ResolvedRun
    mesh: Mesh
    engine: "deepspeed.DeepSpeedEngine"
    objective: Objective
    loader: BatchLoader
    val: Dataset | None
    """None: the corpus has no validation split, and there are no evaluations."""
    saver: CheckpointSaver
    record: NullRecord
    control: RunControl
    profiler: StepProfiler
    state: TrainState
    last_checkpoint: Path | None = None
    proven: bool = False
    """Whether this engine has loaded a checkpoint of its own form; if not, it does so after its first save."""
    _pending: list[PendingStep] = field(default_factory=list)
    _arriving: list[Figures] = field(default_factory=list)
    _skipped: int = 0

    def __post_init__(self) -> None:
        self.timer = StepTimer(self.engine.device)
        self._copy = DeviceCopy(self.engine.device)
        self._tokens_per_step = self.loader.global_batch_size * self.resolved.data.seq_len

    def fit(self) -> bool:
        """Train to the last step, or until a stop is requested; evaluate and save on the way and at the end. Returns
        whether the last step was reached. Every rank calls this.

        Raises:
            BadStepError: a loss or gradient norm is NaN or infinite, beyond what `skip_bad_steps` allows.
            CheckpointError: a checkpoint could not be written.
        """
        train = self.resolved.train
        self.engine.train()
        self.timer.restart()
        with contextlib.closing(self.loader.iterate(self.state.step, ahead=train.num_workers > 0)) as steps:
            while self.state.step < train.steps:
                with self._keeping_made_steps():
                    self.train_step(self._next(steps))
                step = self.state.step
                requests, num_here = self._agree()
                is_last = step == train.steps or requests.stop
                save_now = is_last or requests.save or _is_due(step, train.save_every)
                evaluate_now = self.val is not None and (step == train.steps or _is_due(step, train.eval_every))
                must_wait = save_now or evaluate_now or bool(train.skip_bad_steps)
                if must_wait or step % train.log_every == 0:
                    self._send_figures()
                self._log_figures(len(self._arriving) if must_wait or self.engine.device.type == "cpu" else num_here)
                with self._keeping_made_steps():
                    eval_loss = self._evaluate() if evaluate_now else None
                if save_now:
                    self._save(eval_loss, wait=is_last)
                if requests.save:
                    self.control.requests.done()
                if requests.stop:
                    self.record.log(f"step {step}  stopped by {requests.reason}; the same command continues the run")
                    self.record.log_event("stop", step, f"stopped by {requests.reason}")
                    return step == train.steps
        self.record.log_event("finish", self.state.step, "reached its last step")
        return True

    @contextlib.contextmanager
    def _keeping_made_steps(self) -> Generator[None, None, None]:
        """Save what no checkpoint has where a step or an evaluation cannot be made, on any rank."""
        try:
            yield
        except UnmadeStep:
            self._send_figures()
            self._log_figures(len(self._arriving))
            self._note_saved(self.saver.wait())
            if self.state.step > (step_of(self.last_checkpoint) if self.last_checkpoint else 0):
                self._save(None, wait=True)
            raise

    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step from this rank's micro-batches, without waiting for the device. Every rank calls this."""
        step, model = self.state.step, self.resolved.model
        self._seed_dropout(step)
        lr = self._set_learning_rate(step)
        self.control.report(step + 1, "making the batch")
        with self.timer.part("rollout"):
            batches = self.objective.roll_out(self.engine, batches, step)
        num_targets = self._count_targets(batches)  # () of the whole step, on every rank
        # DeepSpeed divides by the accumulation and averages over the ranks with other tokens (not over all processes);
        # this undoes both and divides by the targets.
        scale = len(batches) * self.mesh.num_averaging / num_targets
        batches = list(map(self._copy, batches))
        sums = StepSums(self.engine.device, num_targets, len(batches) * self.mesh.num_averaging)
        balances_step = expert_balance.balances_step(model)
        share = self._read_expert_share(batches) if balances_step and len(batches) > 1 else None
        for batch in batches:
            self.control.report(step + 1, "forward and backward")
            with self.timer.part("forward"):
                parts = self.objective.loss(self.engine, batch)
            if balances_step and parts.aux_loss is not None:
                parts = parts._replace(aux_loss=expert_balance.step_aux_loss(parts, share, model, self.mesh))
            sums.add(parts)
            total = parts.loss * scale
            if parts.aux_loss is not None:  # a mean over this micro-batch: DeepSpeed's own averaging is right for it
                total = total + parts.aux_loss
            with self.timer.part("backward"):
                self.engine.backward(total)
            if batch is not batches[-1]:
                self.engine.step()  # not at an accumulation boundary: counts the micro-batch
        self.control.report(step + 1, "optimizer step")
        with self.timer.part("optimizer"):
            grad_norm = optimizer_step(self.engine, self.resolved)
        if sums.expert_counts is not None and model.router_bias_update_rate and self.resolved.trains_routers:
            expert_balance.step_router_biases(self.engine, sums.expert_counts, grad_norm, self.mesh)
        self.state = replace(
            self.state,
            step=step + 1,
            consumed_samples=self.state.consumed_samples + self.loader.global_batch_size,
            tokens_seen=self.state.tokens_seen + self._tokens_per_step,
        )
        scale_now = loss_scale(self.engine) if self.resolved.train.precision == "fp16" else None
        self._pending.append(PendingStep(self.state, sums, grad_norm, lr, scale_now))
        if table := self.profiler.step():
            self.record.log(table)

    def _read_expert_share(self, batches: list[Batch]) -> torch.Tensor:
        self.control.report(self.state.step + 1, "reading the experts' load")
        with self.timer.part("forward"):
            share = expert_balance.read_expert_share(self.objective, self.engine, batches, self.mesh)
        self._seed_dropout(self.state.step)  # the same draws again
        return share

    def _next(self, steps: Generator[list[Batch], None, None]) -> list[Batch]:
        self.control.report(self.state.step + 1, "reading the batch")
        try:
            with self.timer.part("data"):
                return next(steps)
        except ShardError as error:
            if torch.distributed.get_world_size() > 1:
                raise  # the other ranks are in the step already: they end as where a rank dies
            raise UnmadeStep(f"{error}; the steps before are saved: bring it back and give the same command") from None

    def _set_learning_rate(self, step: int) -> float:
        train = self.resolved.train
        if train.schedule == "deepspeed":
            return float(self.engine.get_lr()[0])
        lr = learning_rate(step, train)
        set_learning_rate(self.engine, self.resolved, lr)
        return lr

    def _count_targets(self, batches: list[Batch]) -> int:
        """Targets of the whole step over all ranks, which the hosts know without the device. Every rank calls this."""
        count = self.objective.count_targets(batches)
        if self.resolved.data.document_mask and self.mesh.num_averaging > 1:
            (total,) = all_reduce_ints([count], torch.add)
            return max(1, total // self.mesh.tp_size)  # the ranks of a tensor group count the same targets
        return max(1, count * self.mesh.num_averaging)  # without a mask every position of every window has a target

    def _seed_dropout(self, step: int) -> None:
        """Dropout and a router's noise are functions of (seed, step, rank): a resume needs no saved random state."""
        model = self.resolved.model
        if model.dropout or model.attention_dropout or uses_random_routing(self.resolved.train):
            # Distinct for every (step, rank) of a run below 2**20 ranks; torch mixes the bits.
            torch.manual_seed((self.resolved.train.seed << 52 ^ step << 20 ^ self.mesh.averaging_rank) % 2**63)

    def _send_figures(self) -> None:
        """Send the figures of the pending steps to the host. Every rank calls this: it holds collectives."""
        if self._pending:
            self._arriving.append(Figures(self._pending, self.timer, self.mesh))
            self._pending = []

    def _log_figures(self, count: int) -> None:
        """Check and log the first `count` figures that were sent. Every rank calls this: it holds collectives."""
        for figures in self._arriving[:count]:
            figures.wait()
            self._arriving.remove(figures)
            for record in figures.records(self._tokens_per_step, self.loader):
                if problem := figures.find_problem(record, self.resolved.train.precision):
                    self._pass_over(problem)
                self.record.log_step(record)

    def _pass_over(self, problem: str) -> None:
        """Count a bad step, or stop where no more are allowed. Every rank calls this."""
        allowed = self.resolved.train.skip_bad_steps
        self._skipped += 1
        if self._skipped > allowed:
            self._note_saved(self.saver.wait())
            raise BadStepError(
                f"{problem}; nothing of it was saved; last good checkpoint: {self.last_checkpoint or 'none was saved'}"
                "; lower --lr, look at the data of this step, or allow --skip-bad-steps N"
            )
        self.record.log(f"{problem}; weights left as they were ({self._skipped} of {allowed} allowed)")

    def _evaluate(self) -> float | None:
        """Mean loss over the validation windows, the same on any number of ranks. Every rank calls this."""
        step, train = self.state.step, self.resolved.train
        assert self.val is not None
        found = measure_loss(
            self.engine,
            self.val,
            self.engine.device,
            micro_batch_size=train.micro_batch_size,
            max_samples=train.eval_samples or None,
            dp_rank=self.loader.dp_rank,
            dp_size=self.loader.dp_size,
            part=self.loader.part,
            group=self.mesh.averaging,
            before_batch=lambda: self.control.report(step, "evaluating"),
            sums=self.objective.evaluate,
        )
        self.record.log_evaluation(describe_evaluation(step, found))
        self.timer.restart()
        return found.loss

    def _agree(self) -> tuple[Requests, int]:
        """The requests of all ranks, and how many of the sent figures all of them have; also takes a running save
        further. Every rank calls this."""
        self.control.report(self.state.step, "end of the step")
        num_late = sum(not figures.are_here() for figures in self._arriving)
        requests, is_busy, num_late = self.control.all_reduce(not self.saver.is_idle, num_late)
        if self.saver.is_saving and not is_busy:
            self._note_saved(self.saver.advance())
        return requests, len(self._arriving) - num_late

    def _save(self, eval_loss: float | None, *, wait: bool) -> None:
        """Write a checkpoint. Every rank calls this; the figures of all steps are logged and finite."""
        self.control.report(self.state.step, "saving")
        self.record.flush()
        began = time.monotonic()
        self._note_saved(self.saver.wait())  # one at a time
        if (waited := time.monotonic() - began) > 1:
            self.record.log(f"step {self.state.step}  waited {waited:.1f} s for the previous checkpoint to be written")
        probe_loss = engine_probe_loss(self.engine, self.resolved)
        state = replace(self.state, windows_taken=self.loader.taken(self.state.step))
        self.saver.start(state, eval_loss=eval_loss, probe_loss=probe_loss)
        if wait or not self.resolved.train.async_save or not self.proven:
            self._note_saved(self.saver.wait())
        if not self.proven:
            assert self.last_checkpoint is not None
            prove_resumable(self.engine, self.resolved, self.last_checkpoint)
            self.proven = True
        self.timer.restart()

    def _note_saved(self, folder: Path | None) -> None:
        if folder is not None:
            self.last_checkpoint = folder
            self.record.log(f"saved {folder}")
            self.record.log_event("save", step_of(folder), folder.name)


def _is_due(step: int, every: int) -> bool:
    return bool(every and step % every == 0)
