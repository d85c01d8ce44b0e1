"""The figures of steps, still on the device, and their reduction over the ranks into records; those of evaluations."""

import itertools
import math
from dataclasses import dataclass
from typing import Any, cast

import torch

from minimind.accelerator import device_module, has_streams, record_event, widest_float
from minimind.checkpoints.manifest import TrainState
from minimind.config.run_config import Precision
from minimind.data.loader import BatchLoader
from minimind.data.mixture import Mixture
from minimind.distributed.collectives import all_reduce_sum, gather_objects, gather_on_first
from minimind.host import peak_memory
from minimind.inference.evaluation import Evaluation
from minimind.parallel.mesh import Mesh
from minimind.training.objectives.objective import LossParts
from minimind.training.record.run_files import EvaluationRecord, StepRecord
from minimind.training.step_timer import StepTimer, describe_times, seconds


class StepSums:
    """What the micro-batches of this rank add up to in a step, on the device.

    Args:
        num_targets: of the whole step.
        num_parts: micro-batches of the whole step, over the ranks that average.
    """

    def __init__(self, device: torch.device, num_targets: int, num_parts: int) -> None:
        self.loss = torch.zeros((), device=device)  # this rank's share of the global mean loss
        self.aux_loss = torch.zeros((), device=device)  # and of the routers' mean one, 0 for a dense model
        self.figures: dict[str, torch.Tensor] = {}  # () each, its share of the means that the objective logs
        self.expert_counts: torch.Tensor | None = None  # (num_moe_layers, num_experts + 1); None for a dense model
        self.sources: torch.Tensor | None = None  # of a mixture: (2, num_sources), summed losses and targets
        self._num_targets, self._num_parts = num_targets, num_parts

    def add(self, parts: LossParts) -> None:
        """One micro-batch."""
        self.loss += parts.loss.detach() / self._num_targets
        if parts.aux_loss is not None:
            self.aux_loss = self.aux_loss + parts.aux_loss.detach() / self._num_parts
        for name, value in parts.figures.items():
            self.figures[name] = self.figures.get(name, 0) + value / self._num_targets
        self.expert_counts = _plus(self.expert_counts, parts.expert_counts)
        self.sources = _plus(self.sources, parts.sources)


def _plus(total: torch.Tensor | None, value: torch.Tensor | None) -> torch.Tensor | None:
    return value if total is None else total if value is None else total + value


@dataclass(frozen=True)
class PendingStep:
    """A step whose figures are on the device."""

    state: TrainState  # after the step
    sums: StepSums
    grad_norm: torch.Tensor | float | None  # global, before clipping
    lr: float
    loss_scale: float | None


class Figures:
    """The figures of pending steps, on their way to the host. Every rank makes them: it holds collectives.

    Where there are streams nothing waits for the device: the figures are summed over the ranks there, and copied to
    pinned memory.
    """

    def __init__(self, pending: list[PendingStep], timer: StepTimer, mesh: Mesh) -> None:
        self.pending = pending
        self._reading = timer.read()
        losses = torch.stack([item.sums.loss for item in pending])
        dtype = widest_float(losses.device)
        # A number is filled in by the device; as a tensor of its own it would be copied, and the host would wait.
        norms = [
            item.grad_norm.to(losses.device, dtype)
            if isinstance(item.grad_norm, torch.Tensor)
            else losses.new_full((), math.nan if item.grad_norm is None else item.grad_norm, dtype=dtype)
            for item in pending
        ]
        figures = [value for item in pending for value in item.sums.figures.values()]
        sources = [item.sums.sources.flatten() for item in pending if item.sums.sources is not None]
        parts = [losses, torch.stack([*(item.sums.aux_loss for item in pending), *figures]), *sources]
        means = all_reduce_sum(torch.cat(parts), mesh.averaging)
        counts = [item.sums.expert_counts for item in pending if item.sums.expert_counts is not None]
        self._device = losses.device
        self._losses, self._means = _copy_to_host(losses), _copy_to_host(means)
        self._norms = _copy_to_host(torch.stack(norms))
        self._loads = _copy_to_host(all_reduce_sum(torch.stack(counts), mesh.averaging)) if counts else None
        self._copied = record_event(self._device) if has_streams(self._device) else None

    def are_here(self) -> bool:
        """Whether the host has them."""
        return self._copied is None or self._copied.query()

    def wait(self) -> None:
        """Wait for them."""
        if self._copied is not None:
            self._copied.synchronize()

    def find_problem(self, record: StepRecord, precision: Precision) -> str | None:
        """Which figure of one of the records is not finite, and on which ranks; None: all are. Every rank calls this
        with the same record."""
        loss, norm = record["loss"], record["grad_norm"]
        assert loss is not None
        if math.isfinite(loss) and (norm is None or math.isfinite(norm) or precision == "fp16"):
            return None  # an infinite norm alone is how fp16 finds its loss scale
        is_bad_here = not self._losses.isfinite().all()
        ranks = [str(rank) for rank, is_bad in enumerate(gather_objects(is_bad_here)) if is_bad]
        figure = f"gradient norm is {norm}" if math.isfinite(loss) else f"loss is {loss}"
        where = f"rank {', '.join(ranks)}" if ranks else "no single rank (found in the reduced gradient)"
        return f"step {record['step']}: {figure} on {where}"

    def records(self, tokens_per_step: int, loader: BatchLoader) -> list[StepRecord]:
        """The records of the steps, the ranks' times on rank 0 alone; they must be here. Every rank calls this: one
        collective, on host memory.

        Args:
            loader: of the steps' batches; of a mixture it knows what was read of each source.
        """
        count = len(self.pending)
        means = self._means.tolist()
        step_seconds = seconds([self._reading.whole]) / count
        times = gather_on_first([seconds(spans) / count for spans in (self._reading.data, self._reading.forward)])
        peak = peak_memory_bytes(self._device)
        records = []
        for i, item in enumerate(self.pending):
            record: StepRecord = {
                "step": item.state.step,
                "loss": means[i],
                "lr": item.lr,
                "grad_norm": None if item.grad_norm is None else float(self._norms[i]),
                "tokens_seen": item.state.tokens_seen,
                "consumed_samples": item.state.consumed_samples,
                "step_seconds": step_seconds,
                "tokens_per_second": tokens_per_step / step_seconds,
                "peak_memory_bytes": peak,
            }
            if item.loss_scale is not None:
                record["loss_scale"] = item.loss_scale
            if self._loads is not None:
                record["aux_loss"] = means[count + i]
                record.update(summarize_load(item.state.step, self._loads[i]))
            if item.sums.figures:
                values = means[2 * count + i * len(item.sums.figures) :]
                figures: dict[str, Any] = dict(zip(item.sums.figures, values, strict=False))
                record |= cast(StepRecord, figures)
            if item.sums.sources is not None:
                values = means[(2 + len(item.sums.figures)) * count + i * item.sums.sources.numel() :]
                record |= describe_sources(loader, item.state.step, values)
            records.append(record)
        if torch.distributed.get_rank() == 0:
            records[-1].update(describe_times(self.pending[-1].state.step, list(itertools.chain(*times))))
        return records


def describe_sources(loader: BatchLoader, step: int, sums: list[float]) -> StepRecord:
    """The figures by source of a step's record.

    Args:
        sums: of each source its losses, and then of each the number of its targets, summed over the ranks.
    """
    assert isinstance(loader.dataset, Mixture)
    sources, seq_len, taken = loader.dataset.sources, loader.dataset.seq_len, loader.taken(step)
    pairs = zip(sources, sums, sums[len(sources) :], strict=False)
    return {
        "step": step,
        "source_loss": {source.name: loss / count for source, loss, count in pairs if count},
        "source_tokens": {source.name: taken[source.fingerprint] * seq_len for source in sources},
    }


def describe_evaluation(step: int, found: Evaluation) -> EvaluationRecord:
    """The record of an evaluation."""
    record: EvaluationRecord = {
        "step": step,
        "eval_loss": found.loss,
        "eval_bits_per_byte": found.bits_per_byte,
        "eval_perplexity": found.perplexity,
        "eval_targets": found.num_targets,
    }
    figures: dict[str, Any] = {f"eval_{name}": value for name, value in found.figures.items()}
    if found.sources:
        figures["eval_source_loss"] = {name: one.loss for name, one in found.sources.items()}
        bits = {name: one.bits_per_byte for name, one in found.sources.items() if one.bits_per_byte is not None}
        figures["eval_source_bits_per_byte"] = bits
    return cast(EvaluationRecord, {**record, **figures})


def _copy_to_host(tensor: torch.Tensor) -> torch.Tensor:
    """A copy of `tensor`; where there are streams into pinned memory, without waiting for it."""
    pinned = has_streams(tensor.device)
    return torch.empty(tensor.shape, dtype=tensor.dtype, pin_memory=pinned).copy_(tensor, non_blocking=pinned)


def summarize_load(step: int, counts: torch.Tensor) -> StepRecord:
    """The expert figures of a step's record.

    Args:
        counts: (num_moe_layers, num_experts + 1) `LossParts.expert_counts` summed over micro-batches and ranks.
    """
    load, dropped = counts[:, :-1].cpu().double(), counts[:, -1].cpu().double()
    total = load.sum(dim=1)  # (num_moe_layers,)
    shares = load / total.unsqueeze(1)
    most = math.log(load.shape[1]) or 1.0
    entropy = torch.special.entr(shares).sum(dim=1) / most if load.shape[1] > 1 else torch.ones_like(total)
    lost = dropped / total
    return {
        "step": step,
        "load_entropy": float(entropy.mean()),
        "dropped_share": float(lost.mean()),
        "expert_load": load.long().tolist(),
        "expert_balance": {
            "min": load.amin(dim=1).long().tolist(),
            "max": load.amax(dim=1).long().tolist(),
            "entropy": entropy.tolist(),
            "dropped": lost.tolist(),
        },
    }


def peak_memory_bytes(device: torch.device) -> int:
    """Most memory that this rank has held: memory of an accelerator, on a CPU resident memory."""
    if device.type != "cpu":
        return int(device_module(device).max_memory_allocated(device))
    return peak_memory()
