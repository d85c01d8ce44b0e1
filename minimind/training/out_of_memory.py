"""The flags that lower a training run's memory."""

from minimind.config.resolved_run import ResolvedRun


def memory_remedies(resolved: ResolvedRun) -> list[str]:
    """What lowers the memory of this run, cheapest first."""
    train = resolved.train
    found = []
    if train.micro_batch_size > 1:
        found.append(f"lower --micro-batch-size {train.micro_batch_size}")
    if not train.activation_checkpointing:
        found.append("pass --activation-checkpointing")
    if resolved.zero.stage < 3:
        found.append(f"take a ZeRO stage above {resolved.zero.stage} (--ds-config)")
    found.append(f"shorten --seq-len {resolved.data.seq_len}")
    return [*found, "--dry-run itemises what a rank needs"]
