"""How much memory one rank needs: arithmetic over the model, the ZeRO stage, the precision and the batch.

It counts the tensors that torch and DeepSpeed 0.19 allocate at the five moments of a step when memory can be highest;
tests compare it with measured runs. The libraries, CUDA's context and fragmentation are left out. ZeRO's partitioning
follows arXiv 1910.02054.
"""

import dataclasses
from dataclasses import dataclass

from minimind.config.resolved_run import ResolvedRun
from minimind.model.config import ModelConfig
from minimind.reports.plan.activations import activation_bytes, backward_peak, loss_peak, output_matrix_gradient
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


def estimate_memory(resolved: ResolvedRun, device_type: str = "cuda") -> MemoryEstimate:
    """Memory of one rank in a training step of the resolved run.

    Args:
        device_type: on a CPU what counts is resident memory: a buffer counts as far as it is used, and torch's
            unfused kernels keep more.
    """
    states = _States.of(resolved)
    backward, kept_buffer = _gradient_buffers(states, resolved, device_type)
    gathered, prefetched = _gathered(states, resolved)
    activations = activation_bytes(resolved, device_type)
    logits = loss_peak(resolved, device_type)
    update = _update_copies(states, device_type)
    before = states.kept_gradients
    if resolved.train.gradient_accumulation_steps > 1 and not before:
        before = states.gradients
    held = states.parameters + states.optimizer + kept_buffer
    # A GPU takes its buckets whole when the backward begins; on a CPU their pages fill as the activations go.
    buckets_at_start = 0 if device_type == "cpu" else states.bucket_allocation
    moments = (
        held + before + gathered + prefetched,  # the forward begins
        held + before + gathered + activations + logits,  # the loss
        held + before + gathered + activations + buckets_at_start + backward_peak(resolved, device_type),
        held + backward + gathered // 2 + output_matrix_gradient(resolved),  # the last gradients are reduced
        held + states.gradients + update,  # the optimizer updates
    )
    return MemoryEstimate(
        parameters=states.parameters,
        gradients=states.gradients,
        optimizer=states.optimizer,
        activations=activations,
        logits=logits,
        buckets=max(0, backward - states.gradients) + kept_buffer,
        gathered=gathered,
        update=update,
        experts=states.experts,
        host=states.host,
        total=max(moments),
    )


@dataclass(frozen=True)
class _States:
    """What a rank keeps of the model, and the figures that the rest follows from."""

    stage: int
    dp_size: int
    here: int
    """Parameters that a rank computes with: all of them but for experts on other ranks."""
    share: int
    """Parameters in a rank's partition."""
    largest: int
    """Parameters of the largest single tensor."""
    weight_bytes: int
    grad_bytes: int
    bucket: int
    """Elements of `reduce_bucket_size`."""
    bucket_allocation: int
    """Bytes that the buckets take on a GPU, filled or not."""
    whole_gradients: bool
    """Stage 1 in bf16 with float32 accumulation: DeepSpeed's BF16 optimizer keeps whole float32 gradients."""
    parameters: int
    gradients: int
    optimizer: int
    experts: int
    host: int

    @property
    def reduces_whole(self) -> bool:
        """Whether whole gradients are flattened and averaged: not on one rank (`engine.nothing_to_reduce`)."""
        return self.dp_size > 1 or (self.stage == 0 and self.experts > 0)

    @property
    def kept_gradients(self) -> int:
        """Bytes of gradients that stay allocated from step to step."""
        if self.whole_gradients:
            return self.here * self.grad_bytes
        return self.gradients if self.stage == 3 else 0

    @classmethod
    def of(cls, resolved: ResolvedRun) -> "_States":
        model, zero, stage = resolved.model, resolved.zero, resolved.zero.stage
        dp_size, ep_size = resolved.dp_size, resolved.train.ep_size
        total, experts = model.num_params(), count_expert_params(model)
        here = total - experts + experts // ep_size
        share = total // dp_size if stage >= 1 else here
        weight_bytes = zero.weight_bytes
        grad_bytes = 4 if zero.grad_accum_dtype == "fp32" else weight_bytes
        whole = stage == 1 and grad_bytes == 4 and zero.weights == "bf16"
        # ZeRO updates a float32 copy of its partition, also where the weights are float32 already.
        optimizer = share * (8 if stage == 0 else 12)
        parameters = (share if stage == 3 else here) * weight_bytes
        gradients = (here if stage == 0 or whole else share) * grad_bytes
        if whole and not zero.immediate_grad_update:
            # The BF16 optimizer's whole float32 sums stand beside the gradients that the backward gave.
            gradients += here * weight_bytes
        if stage == 3 and zero.hpz_partition_size > 1:
            # The second copy of the weights, inside the node.
            parameters += here // zero.hpz_partition_size * weight_bytes
        host = 0
        if zero.offload_optimizer is not None:
            # The gradients that it updates with, and (stages 1 and 2) the new weights on their way back, lie there too.
            host = optimizer + share * (4 + (weight_bytes if stage < 3 else 0))
            optimizer = gradients = 0
        if zero.offload_param is not None:
            host, parameters = host + parameters, 0
        bucket, buffers = zero.reduce_bucket_size, 0
        if stage in (1, 2) and not whole and zero.contiguous_gradients:
            buffers = bucket * (grad_bytes if stage == 1 else weight_bytes) * (2 if zero.overlap_comm else 1)
        return cls(
            stage=stage,
            dp_size=dp_size,
            here=here,
            share=share,
            largest=largest_tensor(model, ep_size),
            weight_bytes=weight_bytes,
            grad_bytes=grad_bytes,
            bucket=bucket,
            bucket_allocation=buffers,
            whole_gradients=whole,
            parameters=parameters,
            gradients=gradients,
            optimizer=optimizer,
            experts=round((parameters + gradients + optimizer) * (experts // ep_size) / here),
            host=host,
        )


def _gradient_buffers(states: _States, resolved: ResolvedRun, device_type: str) -> tuple[int, int]:
    """Bytes of gradients and buckets when the last gradient is reduced, and of the bucket that stays for ever."""
    here, weight = states.here, states.weight_bytes
    accumulated = states.gradients if resolved.train.gradient_accumulation_steps > 1 else 0
    filled = min(here, states.bucket)
    flattened = min(here, STAGE0_BUCKET) if states.reduces_whole else 0
    if states.stage == 0:
        return states.gradients + flattened * 4, 0
    if states.whole_gradients:
        # The float32 sums flattened, and once more in the precision of the wire.
        return states.gradients + flattened * (4 + weight), 0
    if states.stage == 3:
        whole = states.bucket * weight if device_type != "cpu" else filled * weight
        return states.gradients + filled * weight + filled * states.grad_bytes // states.dp_size, whole
    staged = max(states.bucket_allocation if device_type != "cpu" else 0, filled * weight)
    if states.stage == 1:
        # All gradients wait for the last micro-batch: in the bucket where they fit, beside it where they do not.
        whole_gradients = here * weight if filled < here or device_type != "cpu" else 0
        return whole_gradients + staged + max(filled * weight, states.gradients), 0
    converted = states.largest * 4 if weight < states.grad_bytes else 0
    owned = states.gradients
    if weight == states.grad_bytes and filled == here:
        return accumulated + staged + max(filled * weight, owned), 0
    extra = accumulated if weight == states.grad_bytes else 0
    return extra + owned + staged + filled * weight + converted, 0


def _gathered(states: _States, resolved: ResolvedRun) -> tuple[int, int]:
    """Bytes of whole weights under ZeRO-3, and of the buffer that they come in."""
    zero = resolved.zero
    if states.stage != 3 or (states.dp_size == 1 and zero.offload_param is None):
        return 0, 0
    # A weight that is used again within the reuse distance is kept: a model smaller than it stays gathered as a whole.
    live = min(zero.max_live_parameters, zero.max_reuse_distance)
    needed = largest_gather(resolved.model)
    elements = min(states.here, max(live, needed))
    prefetched = min(elements, max(zero.prefetch_bucket_size, states.largest))
    return elements * states.weight_bytes, prefetched * states.weight_bytes


def _update_copies(states: _States, device_type: str) -> int:
    """Bytes that the update needs for a moment: the partition's gradients flattened, on a CPU a norm in float64."""
    norm = 8 * states.largest if device_type == "cpu" else 0
    flattens = states.stage in (1, 2) and states.weight_bytes == 4
    if flattens or states.stage == 3:
        return max(4 * states.share, norm)
    return norm


def count_expert_params(config: ModelConfig) -> int:
    """Parameters of all routed experts."""
    if not config.use_moe:
        return 0
    layers = sum(config.has_experts(layer) for layer in range(config.num_hidden_layers))
    return layers * config.num_experts * 3 * config.hidden_size * config.expert_feed_forward_size


def largest_tensor(config: ModelConfig, ep_size: int = 1) -> int:
    """Parameters of the largest tensor: the embedding, a feed-forward matrix, or a layer's stacked experts."""
    embedding = config.vocab_size * config.hidden_size
    matrix = config.hidden_size * config.feed_forward_size
    if config.use_moe:
        experts = 2 * config.num_experts * config.hidden_size * config.expert_feed_forward_size // ep_size
        return max(embedding, matrix, experts)
    return max(embedding, matrix)


def largest_gather(config: ModelConfig) -> int:
    """Parameters that ZeRO-3 holds whole at least: two blocks (one in use, one fetched ahead) and the embedding."""
    embedding = config.vocab_size * config.hidden_size
    per_layer = (config.num_params() - embedding) // config.num_hidden_layers
    return embedding + 2 * per_layer


def largest_micro_batch(resolved: ResolvedRun, limit: int, device_type: str = "cuda") -> int:
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
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low
