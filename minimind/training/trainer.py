"""The loop: batches in, optimizer steps, evaluations, checkpoints, records out.

Written to be read from top to bottom. The loss of a step is the sum over all ranks and micro-batches divided by the
number of target tokens of the whole step, and so is its gradient. The host waits for the device only on steps that log.
Knows nothing of flags, files' formats or how the engine was built.
"""

import contextlib
import math
import time
from collections.abc import Generator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from minimind.checkpoints.folder import step_of
from minimind.checkpoints.loading import engine_probe_loss
from minimind.checkpoints.run_state import TrainState
from minimind.checkpoints.saving import CheckpointSaver
from minimind.config.expert_parallel import uses_random_routing
from minimind.config.resolved_run import ResolvedRun
from minimind.data.dataset import TokenDataset
from minimind.data.loader import Batch, BatchLoader, eval_batches
from minimind.distributed.collectives import all_reduce_sum, gather_objects
from minimind.distributed.stop_requests import Requests, StopRequests
from minimind.distributed.watchdog import Watchdog
from minimind.errors import UserError
from minimind.parallel.loss_scale import loss_scale
from minimind.parallel.optimizer import optimizer_step, set_learning_rate
from minimind.training.expert_load import count_choices, load_of, summarize_load
from minimind.training.lr_schedule import learning_rate
from minimind.training.profiler import StepProfiler
from minimind.training.record.metrics import MetricsLog
from minimind.training.run_lock import RunLock, RunLockError
from minimind.training.step_record import PendingStep, make_record
from minimind.training.step_timer import StepClock, describe_times

if TYPE_CHECKING:
    import deepspeed


class BadStepError(UserError):
    """A step's loss or gradient was NaN or infinite."""


@dataclass
class Trainer:
    """One run on one rank. `metrics` and `lock` are None on every rank but the first.

    Args:
        tokens_per_byte: tokens of the validation split divided by the UTF-8 bytes of its text.
        flops_per_token: of a training step; `peak_flops`: of one device, in FLOP/s (None: no MFU).
    """

    resolved: ResolvedRun
    engine: "deepspeed.DeepSpeedEngine"
    loader: BatchLoader
    eval_dataset: TokenDataset | None
    device: torch.device
    metrics: MetricsLog | None
    saver: CheckpointSaver
    requests: StopRequests
    watchdog: Watchdog
    lock: RunLock | None
    state: TrainState
    flops_per_token: float
    peak_flops: float | None
    tokens_per_byte: float = 1.0
    last_checkpoint: Path | None = None
    profiler: StepProfiler | None = None
    _pending: list[PendingStep] = field(default_factory=list)
    _window_began: float = 0.0
    _skipped: int = 0

    def __post_init__(self) -> None:
        self._clock = StepClock(self.device)

    def fit(self) -> bool:
        """Train to the last step, or until somebody asks to stop; evaluate and save on the way and at the end. Returns
        whether the last step was reached. Every rank calls this.

        Raises:
            BadStepError: a loss or gradient norm is NaN or infinite, beyond what `skip_bad_steps` allows.
            CheckpointError: a checkpoint could not be written.
        """
        train = self.resolved.train
        total = train.steps
        self.engine.train()
        self._window_began = time.perf_counter()
        with contextlib.closing(self._batches()) as steps:
            while self.state.step < total:
                self.watchdog.report(self.state.step + 1, "reading the batch")
                with self._clock.waiting_for_data():
                    batches = next(steps)
                self.train_step(batches)
                if self.profiler is not None:
                    self.profiler.step()
                    self._tell_profile()
                step = self.state.step
                self.watchdog.report(step, "end of the step")
                requests = self._agree()
                is_last = step == total or requests.stop
                evaluate_now = step == total or bool(train.eval_every and step % train.eval_every == 0)
                save_now = is_last or requests.save or bool(train.save_every and step % train.save_every == 0)
                if save_now or evaluate_now or step % train.log_every == 0 or train.skip_bad_steps:
                    self._flush()
                eval_loss = None
                if evaluate_now and self.eval_dataset is not None:
                    eval_loss = self.evaluate()["eval_loss"]
                if save_now:
                    self._save(eval_loss, wait=is_last)
                if requests.save:
                    self.requests.done()
                if requests.stop:
                    self._say(f"step {step}  stopped by {requests.reason}; start the same command again to continue")
                    self._log_event("stop", f"stopped by {requests.reason}")
                    return step == total
        self._log_event("finish", "reached its last step")
        return True

    def train_step(self, batches: list[Batch]) -> None:
        """One optimizer step from this rank's micro-batches, without waiting for the device. Every rank calls this."""
        train, step = self.resolved.train, self.state.step
        self._seed_dropout(step)
        lr = learning_rate(step, train) if train.schedule != "deepspeed" else float(self.engine.get_lr()[0])
        if train.schedule != "deepspeed":
            set_learning_rate(self.engine, self.resolved, lr)
        num_targets = self._count_targets(batches)  # () of the whole step, on every rank
        # DeepSpeed divides by the accumulation and averages over the data-parallel ranks (dp_size, not all processes);
        # this undoes both and divides by the targets.
        scale = len(batches) * self.loader.dp_size / num_targets
        loss, aux_loss = torch.zeros((), device=self.device), torch.zeros((), device=self.device)
        choices: torch.Tensor | None = None
        for batch in batches:
            self.watchdog.report(step + 1, "forward and backward")
            moved = batch.to(self.device, non_blocking=True)
            with self._clock.forward():
                output = self.engine(
                    moved.input_ids,
                    moved.labels,
                    position_ids=moved.position_ids,
                    cu_seqlens=moved.cu_seqlens,
                    loss_reduction="sum",
                )
            loss += output.loss.detach() / num_targets
            total = output.loss * scale
            if output.aux_loss is not None:  # a mean over this micro-batch: DeepSpeed's own averaging is right for it
                total = total + output.aux_loss
                aux_loss = aux_loss + output.aux_loss.detach() / (len(batches) * self.loader.dp_size)
                choices = count_choices(output, choices)
            with self._clock.part("backward"):
                self.engine.backward(total)
            if batch is not batches[-1]:
                self.engine.step()  # not at an accumulation boundary: counts the micro-batch
        self.watchdog.report(step + 1, "optimizer step")
        with self._clock.part("optimizer"):
            grad_norm = optimizer_step(self.engine, self.resolved)
        scale_now = loss_scale(self.engine) if train.precision == "fp16" else None
        self._step_router_biases(choices, grad_norm)
        self._pending.append(PendingStep(step + 1, loss, aux_loss, grad_norm, lr, scale_now, choices))
        self.state = replace(
            self.state,
            step=step + 1,
            consumed_samples=self.state.consumed_samples + self.loader.global_batch_size,
            tokens_seen=self.state.tokens_seen + self.loader.global_batch_size * self.resolved.data.seq_len,
        )

    @torch.no_grad()
    def evaluate(self) -> dict[str, Any]:
        """Mean loss over the validation windows, the same on any number of ranks. Every rank calls this."""
        assert self.eval_dataset is not None
        train = self.resolved.train
        self.engine.eval()
        totals = torch.zeros(2, dtype=torch.float64, device=self.device)  # sum of losses, number of targets
        for batch in eval_batches(
            self.eval_dataset,
            self.loader.micro_batch_size,
            self.loader.dp_rank,
            self.loader.dp_size,
            max_samples=train.eval_samples or None,
        ):
            self.watchdog.report(self.state.step, "evaluating")
            moved = batch.to(self.device, non_blocking=True)
            output = self.engine(
                moved.input_ids,
                moved.labels,
                position_ids=moved.position_ids,
                cu_seqlens=moved.cu_seqlens,
                loss_reduction="sum",
            )
            totals += torch.stack([output.loss.double(), torch.tensor(float(batch.num_targets)).to(totals)])
        self.engine.train()
        loss_sum, num_targets = all_reduce_sum(totals).tolist()
        loss = loss_sum / num_targets
        record = {
            "step": self.state.step,
            "eval_loss": loss,
            "eval_bits_per_byte": loss / math.log(2) * self.tokens_per_byte,
            "eval_perplexity": math.exp(min(loss, 700.0)),
            "eval_targets": int(num_targets),
        }
        if self.metrics is not None:
            self.metrics.log_evaluation(record)
        self._window_began = time.perf_counter()
        return record

    def _batches(self) -> Generator[list[Batch], None, None]:
        step = self.state.step
        if self.resolved.train.num_workers:
            yield from self.loader.iterate(step)
        while True:
            yield self.loader.step_batches(step)
            step += 1

    def _count_targets(self, batches: list[Batch]) -> torch.Tensor:
        """Target tokens of the whole step over all ranks, as a tensor on the device."""
        count = torch.tensor(float(sum(batch.num_targets for batch in batches)), device=self.device)
        if self.resolved.data.document_mask:
            return all_reduce_sum(count).clamp(min=1)
        return count * self.loader.dp_size  # without a mask every position of every window has a target

    def _seed_dropout(self, step: int) -> None:
        """Dropout and a router's noise are functions of (seed, step, rank): a resume needs no saved random state."""
        model = self.resolved.model
        if model.dropout or model.attention_dropout or uses_random_routing(self.resolved.train):
            # Distinct for every (step, rank) of a run below 2**20 ranks; torch mixes the bits.
            seed = (self.resolved.train.seed << 52 ^ step << 20 ^ self.loader.dp_rank) % 2**63
            torch.manual_seed(seed)

    def _step_router_biases(self, choices: torch.Tensor | None, grad_norm: torch.Tensor | float | None) -> None:
        """Move the routers' selection biases, where the model has them, by the load of the whole step; a step whose
        gradient was not finite moves nothing. Every rank calls this."""
        if choices is None or not self.resolved.model.router_bias_update_rate:
            return
        load = all_reduce_sum(load_of(choices).clone())
        finite = torch.isfinite(torch.as_tensor(0.0 if grad_norm is None else grad_norm, device=self.device))
        self.engine.module.step_router_biases(load * finite)

    def _flush(self) -> None:
        """Bring the pending steps to the host, check and log them. Every rank calls this: it holds a collective."""
        if not self._pending:
            return
        pending, self._pending = self._pending, []
        losses = torch.stack([item.loss for item in pending])
        local_bad = int((~torch.isfinite(losses)).nonzero()[0]) if not bool(torch.isfinite(losses).all()) else None
        auxiliary = torch.stack([item.aux_loss for item in pending])
        # Every rank's own times ride along, each in its place.
        times = torch.zeros(torch.distributed.get_world_size(), 2)
        times[torch.distributed.get_rank()] = torch.tensor(self._clock.read()) / len(pending)
        summed = all_reduce_sum(torch.cat([losses, auxiliary, times.flatten().to(losses)])).tolist()
        means, aux_means = summed[: len(pending)], summed[len(pending) : 2 * len(pending)]
        counted = [item.choices for item in pending if item.choices is not None]
        loads = all_reduce_sum(torch.stack(counted)).cpu() if counted else None
        now = time.perf_counter()
        seconds = (now - self._window_began) / len(pending)
        self._window_began = now
        norms = [None if item.grad_norm is None else float(item.grad_norm) for item in pending]
        for i, (item, loss, aux_loss, norm) in enumerate(zip(pending, means, aux_means, norms, strict=True)):
            self._check_step(item, loss, norm, local_bad is not None)
            if self.metrics is not None:
                record = make_record(item, loss, norm, seconds, **self._scale_of_a_step())
                if item is pending[-1]:
                    record |= describe_times(summed[2 * len(pending) :])
                if loads is not None:
                    record |= {"aux_loss": aux_loss, **summarize_load(loads[i])}
                self.metrics.log_step(record)
        if self.metrics is not None and loads is not None:
            for layer, load in enumerate(load_of(loads[-1])):
                self.metrics.log_histogram(f"experts/load_{layer}", load, pending[-1].step)

    def _scale_of_a_step(self) -> dict[str, Any]:
        samples = self.loader.global_batch_size
        return dict(
            samples=samples,
            tokens=samples * self.resolved.data.seq_len,
            flops_per_token=self.flops_per_token,
            peak_flops=self.peak_flops and self.peak_flops * torch.distributed.get_world_size(),
            device=self.device,
        )

    def _check_step(self, item: PendingStep, loss: float, norm: float | None, local_bad: bool) -> None:
        """Stop, or count a skipped step, when a figure is not finite. Every rank comes here with the same figures."""
        finite_norm = norm is None or math.isfinite(norm)
        if math.isfinite(loss) and (finite_norm or self.resolved.train.precision == "fp16"):
            return  # an infinite norm alone is how fp16 finds its loss scale
        ranks = [rank for rank, bad in enumerate(gather_objects(local_bad)) if bad]
        what = "gradient norm" if math.isfinite(loss) else "loss"
        where = f"rank {', '.join(map(str, ranks))}" if ranks else "no single rank (found in the reduced gradient)"
        allowed = self.resolved.train.skip_bad_steps
        self._skipped += 1
        if self._skipped <= allowed:
            if self.metrics is not None:
                self.metrics.say(
                    f"step {item.step}: {what} is {loss if what == 'loss' else norm} on {where}; weights left as they "
                    f"were ({self._skipped} of {allowed} allowed)"
                )
            return
        self._note_saved(self.saver.wait())  # every rank is here
        good = str(self.last_checkpoint) if self.last_checkpoint else "none was saved"
        raise BadStepError(
            f"step {item.step}: {what} is {loss if what == 'loss' else norm} on {where}; nothing of it was saved; last "
            f"good checkpoint: {good}; lower --lr, look at the data of this step, or allow --skip-bad-steps N"
        )

    def _agree(self) -> Requests:
        """What anybody asked of any rank; also takes a running save further. Every rank calls this."""
        busy, lost = int(not self.saver.is_idle), int(self.lock is not None and self.lock.is_lost)
        requests, (busy, lost) = self.requests.all_reduce((busy, lost))
        if lost:
            raise RunLockError(f"{self.resolved.train.run_dir}: another job has taken this run over; stopped")
        if self.saver.is_saving and not busy:
            self._note_saved(self.saver.advance())
        return requests

    def _save(self, eval_loss: float | None, *, wait: bool) -> None:
        """Write a checkpoint. Every rank calls this; the pending steps are flushed and finite."""
        self.watchdog.report(self.state.step, "saving")
        if self.metrics is not None:
            self.metrics.flush()
        began = time.monotonic()
        self._note_saved(self.saver.wait())  # one at a time
        if (waited := time.monotonic() - began) > 1:
            self._say(f"step {self.state.step}  waited {waited:.1f} s for the checkpoint before to be on the disk")
        probe_loss = engine_probe_loss(self.engine, self.resolved)
        self.saver.start(self.state, eval_loss=eval_loss, probe_loss=probe_loss)
        if wait or not self.resolved.train.async_save:
            self._note_saved(self.saver.wait())
        self._window_began = time.perf_counter()

    def _note_saved(self, folder: Path | None) -> None:
        if folder is not None:
            self.last_checkpoint = folder
            self._say(f"saved {folder}")
            self._log_event("save", folder.name, step_of(folder))

    def _log_event(self, event: str, message: str, step: int | None = None) -> None:
        if self.metrics is not None:
            self.metrics.log_event(event, self.state.step if step is None else step, message)

    def _tell_profile(self) -> None:
        """Show this rank's profile once it is there, and be done with it."""
        if self.profiler is not None and self.profiler.table is not None:
            self._say(self.profiler.table)
            self.profiler.close()
            self.profiler = None

    def _say(self, message: str) -> None:
        if self.metrics is not None:
            self.metrics.say(message)
