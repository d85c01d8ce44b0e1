"""How much memory one rank needs: arithmetic over the model, the ZeRO stage, the precision and the batch.

It counts the tensors that torch and DeepSpeed 0.19 allocate at the five moments of a step when memory can be highest;
tests compare it with measured runs. The libraries, CUDA's context and fragmentation are left out. ZeRO's partitioning
follows arXiv 1910.02054.
"""

import bisect
import dataclasses
import math
from dataclasses import dataclass

from minimind.config.resolved_run import ResolvedRun
from minimind.model.config import ModelConfig
from minimind.model.tuning import count
from minimind.reports.plan.activations import (
    activation_bytes,
    backward_peak,
    loss_peak,
    output_matrix_gradient,
    params_of_rank,
)
from minimind.units import format_bytes

STAGE0_BUCKET = 500_000_000
"""Elements that DeepSpeed flattens at once where it averages whole gradients (its own fixed figure)."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank's device, item by item, and on its host where states are offloaded."""

    parameters: int
    gradients: int
    optimizer: int
    """Moments, and the float32 copy of the weights that ZeRO keeps."""
    activations: int
    logits: int
    """The loss at its peak: a chunk of logits and its gradient, and the gradient of the output matrix."""
    buckets: int
    """Buffers in which gradients are gathered and reduced."""
    gathered: int
    """Whole weights that ZeRO-3 brings together from all ranks."""
    update: int
    """Temporary copies while the optimizer updates."""
    experts: int
    """How much of the parameters, gradients and optimizer states belongs to routed experts."""
    host: int
    total: int
    """The highest of the moments of a step; less than the sum of the items, which are never all there at once."""

    @property
    def states(self) -> int:
        """What stays whatever the batch."""
        return self.parameters + self.gradients + self.optimizer

    def summary(self) -> str:
        """The estimate in one line."""
        items = [name for name in ITEMS if getattr(self, name)]
        parts = ", ".join(f"{name} {format_bytes(getattr(self, name))}" for name in items)
        host = f"; host {format_bytes(self.host)}" if self.host else ""
        return f"about {format_bytes(self.total)} a rank at the peak ({parts}){host}"


ITEMS = ("parameters", "gradients", "optimizer", "activations", "logits", "buckets", "gathered", "update")


def estimate_memory(resolved: ResolvedRun, device_type: str = "gpu") -> MemoryEstimate:
    """Memory of one rank in a training step of the resolved run.

    Args:
        device_type: on a CPU what counts is resident memory: a buffer counts as far as it is used, and torch's
            unfused kernels keep more.
    """
    rank = _Rank(resolved, device_type)
    backward, kept_buffer = rank.gradient_buffers()
    gathered, prefetched = rank.gathered()
    activations, logits = activation_bytes(resolved, device_type), loss_peak(resolved, device_type)
    before = rank.kept_gradients or (rank.gradients if rank.accumulates else 0)
    held = rank.parameters + rank.optimizer + kept_buffer
    moments = (
        held + before + gathered + prefetched,  # the forward begins
        held + before + gathered + activations + logits,  # the loss
        # A GPU takes its buckets whole when the backward begins; on a CPU their pages fill as the activations go.
        held + before + gathered + activations + rank.buckets + backward_peak(resolved, device_type),
        held + backward + gathered // 2 + output_matrix_gradient(resolved),  # the last gradients are reduced
        held + rank.gradients + rank.update,  # the optimizer updates
    )
    return MemoryEstimate(
        parameters=rank.parameters,
        gradients=rank.gradients,
        optimizer=rank.optimizer,
        activations=activations,
        logits=logits,
        buckets=max(0, backward - rank.gradients) + kept_buffer,
        gathered=gathered,
        update=rank.update,
        experts=rank.experts,
        host=rank.host,
        total=max(moments),
    )


class _Rank:
    """What a rank keeps of the model: counts of elements, and bytes of `parameters`, `gradients`, `optimizer`,
    `buckets` and what is on the `host`."""

    def __init__(self, resolved: ResolvedRun, device_type: str) -> None:
        model, ep_size, self.tp_size = resolved.model, resolved.train.ep_size, resolved.train.tp_size
        self.model, self.zero = model, resolved.zero
        # Ranks of one sequence hold the same weights, so ZeRO divides the states by them too.
        self.num_ranks = resolved.dp_size * resolved.train.sp_size
        self.stage, self.on_cpu = self.zero.stage, device_type == "cpu"
        self.accumulates = resolved.train.gradient_accumulation_steps > 1
        experts = count_expert_params(model) // ep_size
        whole = params_of_rank(model, self.tp_size)
        self.here = whole - experts * (ep_size - 1)  # it computes with all but experts on other ranks
        # What the optimizer updates: of all ranks, and (gradients) of this one.
        trained = self.trained_here = count(resolved.trained)
        whole -= experts * ep_size - experts * ep_size // self.tp_size  # cut over all ranks, and the rest over fewer
        if not resolved.train.keeps_frozen:
            trained, self.trained_here = whole, self.here
        adapters = trained if resolved.train.lora is not None else 0
        self.here += adapters
        # Its partitions of the weights, and of what is trained.
        self.share = (whole + adapters) // self.num_ranks if self.stage >= 1 else self.here
        self.trained_share = trained // self.num_ranks if self.stage >= 1 else self.trained_here
        self.muon_share = round(self.trained_share * resolved.num_muon_params / trained)
        self.largest = self.largest_trained = largest_tensor(model, ep_size)
        if resolved.train.keeps_frozen:
            self.largest_trained = max(map(math.prod, resolved.trained.values()))
        self.weight_bytes = self.zero.weight_bytes
        self.grad_bytes = 4 if self.zero.grad_accum_dtype == "fp32" else self.weight_bytes
        # Stage 1 in bf16 with float32 accumulation: DeepSpeed's BF16 optimizer keeps whole float32 gradients.
        self.whole_gradients = self.stage == 1 and self.grad_bytes == 4 and self.zero.weights == "bf16"
        self._count_states()
        # Whole gradients are flattened and averaged, but not on one rank (`engine.nothing_to_reduce`).
        reduces_whole = self.num_ranks > 1 or (self.stage == 0 and experts > 0)
        self.flattened = min(self.trained_here, STAGE0_BUCKET) if reduces_whole else 0
        self.buckets = 0
        if self.stage in (1, 2) and not self.whole_gradients and self.zero.contiguous_gradients and not self.on_cpu:
            each = self.zero.reduce_bucket_size * (self.grad_bytes if self.stage == 1 else self.weight_bytes)
            self.buckets = each * (2 if self.zero.overlap_comm else 1)
        states = self.parameters + (0 if resolved.train.lora is not None else self.gradients + self.optimizer)
        self.experts = round(states * experts / self.here)

    def _count_states(self) -> None:
        zero, here, trained, share, weight = (
            self.zero,
            self.here,
            self.trained_here,
            self.trained_share,
            self.weight_bytes,
        )
        # ZeRO updates a float32 copy of its partition, also where the weights are float32 already.
        self.optimizer = share * (8 if self.stage == 0 else 12) - 4 * self.muon_share
        self.parameters = (self.share if self.stage == 3 else here) * weight
        self.gradients = (trained if self.stage == 0 or self.whole_gradients else share) * self.grad_bytes
        if self.whole_gradients and not zero.immediate_grad_update:
            # The BF16 optimizer's whole float32 sums stand beside the gradients that the backward gave.
            self.gradients += trained * weight
        if self.stage == 3 and zero.hpz_partition_size > 1:
            # The second copy of the weights, inside the node.
            self.parameters += here // zero.hpz_partition_size * weight
        self.host = 0
        if zero.offload_optimizer is not None:
            # The gradients that it updates with, and (stages 1 and 2) the new weights on their way back, lie there too.
            self.host = self.optimizer + share * (4 + (weight if self.stage < 3 else 0))
            self.optimizer = self.gradients = 0
        if zero.offload_param is not None:
            self.host, self.parameters = self.host + self.parameters, 0

    @property
    def kept_gradients(self) -> int:
        """Bytes of gradients that stay allocated from step to step."""
        if self.whole_gradients:
            return self.trained_here * self.grad_bytes
        return self.gradients if self.stage == 3 else 0

    def gradient_buffers(self) -> tuple[int, int]:
        """Bytes of gradients and buckets when the last gradient is reduced, and of the bucket that stays for ever."""
        here, weight, gradients = self.trained_here, self.weight_bytes, self.gradients
        if self.stage == 0:
            return gradients + self.flattened * 4, 0
        if self.whole_gradients:
            # The float32 sums flattened, and once more in the precision of the wire.
            return gradients + self.flattened * (4 + weight), 0
        elements = min(here, self.zero.reduce_bucket_size)
        filled = elements * weight
        if self.stage == 3:
            kept = filled if self.on_cpu else self.zero.reduce_bucket_size * weight
            return gradients + filled + elements * self.grad_bytes // self.num_ranks, kept
        staged = max(self.buckets, filled)
        if self.stage == 1:
            # All gradients wait for the last micro-batch: in the bucket where they fit, beside it where they do not.
            beside = 0 if elements == here and self.on_cpu else here * weight
            return beside + staged + max(filled, gradients), 0
        converts = weight < self.grad_bytes
        accumulated = gradients if self.accumulates and not converts else 0
        if not converts and elements == here:
            return accumulated + staged + max(filled, gradients), 0
        return accumulated + gradients + staged + filled + (self.largest_trained * 4 if converts else 0), 0

    def gathered(self) -> tuple[int, int]:
        """Bytes of whole weights under ZeRO-3, and of the buffer that they come in."""
        zero = self.zero
        if self.stage != 3 or (self.num_ranks == 1 and zero.offload_param is None):
            return 0, 0
        # A weight used again within the reuse distance is kept: a model smaller than it stays gathered as a whole.
        live = min(zero.max_live_parameters, zero.max_reuse_distance)
        elements = min(self.here, max(live, largest_gather(self.model, self.tp_size)))
        prefetched = min(elements, max(zero.prefetch_bucket_size, self.largest))
        return elements * self.weight_bytes, prefetched * self.weight_bytes

    @property
    def update(self) -> int:
        """Bytes that the update needs for a moment: the partition's gradients flattened, and a norm in float64, which
        on a GPU stages 2 and 3 alone take; what Muon is to subtract."""
        norm = 8 * self.largest_trained if self.on_cpu or self.stage >= 2 else 0
        flattens = self.stage == 3 or (self.stage in (1, 2) and self.weight_bytes == 4)
        return max(4 * self.trained_share if flattens else 0, norm) + 4 * self.muon_share


def count_expert_params(config: ModelConfig) -> int:
    """Parameters of all routed experts."""
    if not config.use_moe:
        return 0
    layers = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    return layers * config.num_experts * 3 * config.hidden_size * config.expert_feed_forward_size


def largest_tensor(config: ModelConfig, ep_size: int = 1) -> int:
    """Parameters of the largest tensor: the embedding, a feed-forward matrix, or a layer's stacked experts."""
    hidden, experts = config.hidden_size, 0
    if config.use_moe:
        experts = 2 * config.num_experts * hidden * config.expert_feed_forward_size // ep_size
    return max(config.vocab_size * hidden, hidden * config.feed_forward_size, experts)


def largest_gather(config: ModelConfig, tp_size: int = 1) -> int:
    """Parameters that ZeRO-3 holds whole at least: two blocks (one in use, one fetched ahead) and the embedding."""
    embedding = config.vocab_size * config.hidden_size
    return embedding + 2 * ((params_of_rank(config, tp_size) - embedding) // config.num_hidden_layers)


def largest_micro_batch(resolved: ResolvedRun, limit: int, device_type: str = "gpu") -> int:
    """The most sequences of a forward whose step stays below `limit` bytes a rank; 0 where not even one does.

    The accumulation is held as it is, so the global batch grows with the micro-batch.
    """

    def fits(micro: int) -> bool:
        train = dataclasses.replace(resolved.train, micro_batch_size=micro)
        return estimate_memory(dataclasses.replace(resolved, train=train), device_type).total <= limit

    if not fits(1):
        return 0
    low, high = 1, 2
    while fits(high) and high < 2**20:
        low, high = high, 2 * high
    return low + bisect.bisect_left(range(low + 1, high), True, key=lambda micro: not fits(micro))
