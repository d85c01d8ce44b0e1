"""How much memory one rank will need: arithmetic over the model, the ZeRO stage, the precision and the batch.

An estimate to plan with, not a measurement: it counts the tensors that training keeps, and leaves out the allocator's
fragmentation, CUDA's context and the libraries. ZeRO's partitioning follows arXiv 1910.02054. Knows no device.
"""

from dataclasses import dataclass

from minimind.ds_config import Resolved
from minimind.ds_sections import offload_device
from minimind.model.config import ModelConfig

CHUNK_LOGITS = 2**25
"""Logits that stand in memory at once in the loss (fewer on a CPU), and their gradient beside them."""


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes on one rank's device, item by item, and on its host where states are offloaded."""

    parameters: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    buffers: int
    host: int

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return self.parameters + self.gradients + self.optimizer + self.activations + self.logits + self.buffers

    def summary(self) -> str:
        """One line for people."""
        items = ("parameters", "gradients", "optimizer", "activations", "logits", "buffers")
        parts = ", ".join(f"{name} {format_bytes(getattr(self, name))}" for name in items)
        host = f"; host {format_bytes(self.host)}" if self.host else ""
        return f"about {format_bytes(self.total)} a rank ({parts}){host}"


def format_bytes(count: float) -> str:
    """1536 -> '1.5 KiB'."""
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if count < 1024 or unit == "TiB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1024
    raise AssertionError


def estimate_memory(resolved: Resolved, world_size: int) -> MemoryEstimate:
    """Memory of one rank of `world_size` in a training step of the resolved run.

    Parameters in the precision of the run (fp32 under autocast); gradients in the accumulation type, whole in stages 0
    and 1, a partition in 2 and 3; optimizer: two fp32 moments, and an fp32 copy of the weights where they are 16-bit.
    """
    run, ds, stage = resolved.run, resolved.ds, resolved.zero_stage
    params = run.model.num_params()
    sixteen = any(ds.get(key, {}).get("enabled") for key in ("bf16", "fp16"))
    weight_bytes = 2 if sixteen else 4
    accumulates_fp32 = ds.get("data_types", {}).get("grad_accum_dtype") == "fp32"
    grad_bytes = 4 if accumulates_fp32 or not sixteen else 2
    optimizer_params = params // world_size if stage >= 1 else params
    optimizer = optimizer_params * (8 + (4 if sixteen else 0))
    gradients = params * grad_bytes
    if stage >= 2:
        # A partition in the accumulation type, and the 16-bit gradients of the bucket on their way to their owner.
        bucket = min(params, int(ds.get("zero_optimization", {}).get("reduce_bucket_size", 5e8)))
        gradients = params // world_size * grad_bytes + bucket * weight_bytes
    parameters = params * weight_bytes if stage < 3 else params // world_size * weight_bytes
    buffers = 0
    if stage == 3:
        live = int(ds.get("zero_optimization", {}).get("stage3_max_live_parameters", 1e9))
        buffers = min(params, live, largest_gather(run.model)) * weight_bytes
        hpz = ds["zero_optimization"].get("zero_hpz_partition_size", 1)
        if hpz > 1:
            buffers += params // hpz * weight_bytes  # the second copy of the weights, inside the node
    host = 0
    if offload_device(ds, "optimizer") is not None:
        host, optimizer = optimizer, 0
    if offload_device(ds, "param") is not None:
        host, parameters = host + parameters, 0
    tokens = (run.train.micro_batch_size or 1) * run.data.seq_len
    activation_bytes = 4 if run.train.precision == "fp32" else 2
    layer = tokens * layer_activations_per_token(run.model) * activation_bytes
    boundary = tokens * run.model.hidden_size * activation_bytes
    layers = run.model.num_hidden_layers
    activations = layers * boundary + layer if run.train.activation_checkpointing else layers * layer
    # Beside the logits, the loss holds the float32 gradient of the output matrix until the backward takes it.
    logits = 8 * min(tokens * run.model.vocab_size, CHUNK_LOGITS) + 4 * run.model.vocab_size * run.model.hidden_size
    return MemoryEstimate(parameters, gradients, optimizer, activations, logits, buffers, host)


def largest_gather(config: ModelConfig) -> int:
    """Parameters that ZeRO-3 holds whole at once: two blocks (one in use, one fetched ahead) and the embedding."""
    embedding = config.vocab_size * config.hidden_size
    per_layer = (config.num_params() - embedding) // config.num_hidden_layers
    return embedding + 2 * per_layer


def layer_activations_per_token(config: ModelConfig) -> int:
    """Elements that the backward of one block keeps for a token, with flash attention.

    The residual before each norm and the normalised value (4 x hidden), queries, keys and values before and after the
    rotation (and the norm), the attention output, and four feed-forward widths (gate, up, SiLU of gate, product).
    """
    query = config.num_attention_heads * config.head_size
    key = config.num_key_value_heads * config.head_size
    rotated = (3 if config.qk_norm else 2) * (query + key) + key
    if config.use_moe:
        width = config.expert_feed_forward_size * (config.num_experts_per_tok + config.n_shared_experts)
        extra = 2 * config.hidden_size * config.num_experts_per_tok
    else:
        width, extra = config.feed_forward_size, 0
    return 4 * config.hidden_size + rotated + query + 4 * width + extra
