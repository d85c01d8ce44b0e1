"""Checkpoint self-test: the loss of one fixed batch is stored at save time and must be reproduced on load.

The batch depends on the vocabulary alone.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from minimind.checkpoints.manifest import CheckpointError, CheckpointManifest

BATCH_SIZE = 2
MAX_LENGTH = 64

# Relative differences of the loss that another kernel, order of sums or (low precision) rounding may make.
FP32_TOLERANCE = 1e-5
LOW_PRECISION_TOLERANCE = 1e-2


def probe_batch(vocab_size: int, max_length: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Inputs and labels of the probe, each (BATCH_SIZE, T) int64 with T at most `MAX_LENGTH`."""
    length = min(MAX_LENGTH, max_length)
    # A fixed linear congruence instead of a generator of torch, whose numbers may change between versions.
    value, values = 12345, []
    for _ in range(BATCH_SIZE * (length + 1)):
        value = (value * 1103515245 + 12345) % 2**31
        values.append((value >> 8) % vocab_size)
    tokens = torch.tensor(values).view(BATCH_SIZE, length + 1)
    return tokens[:, :-1].contiguous(), tokens[:, 1:].contiguous()


@torch.no_grad()
def probe_loss(model: Callable[..., Any], config: Any, device: torch.device | str) -> float:
    """Mean loss of the probe batch; `model` must be in evaluation mode. Under ZeRO-3 every rank calls this."""
    input_ids, labels = probe_batch(config.vocab_size, config.max_position_embeddings)
    return float(model(input_ids.to(device), labels.to(device)).loss)


def check_probe_loss(
    folder: Path,
    manifest: CheckpointManifest,
    compute_loss: Callable[[], float],
    *,
    low_precision: bool,
    find_differences: Callable[[], Sequence[str]],
) -> None:
    """Compare the probe loss of what was loaded with the one that was stored when it was saved, if it was.

    Args:
        low_precision: it was saved by, or is computed in, 16-bit arithmetic.
        find_differences: names of the tensors that are not those of the checkpoint, for the error.

    Raises:
        CheckpointError: the losses differ: the weights are not the ones that were trained.
    """
    expected = manifest.probe_loss
    if expected is None:
        return
    found = compute_loss()
    tolerance = LOW_PRECISION_TOLERANCE if low_precision else FP32_TOLERANCE
    if math.isclose(expected, found, rel_tol=tolerance) or (math.isnan(expected) and math.isnan(found)):
        return
    raise CheckpointError(
        f"{folder}: loaded, but the probe batch has loss {found:.6f} instead of {expected:.6f}; tensors that differ: "
        f"{', '.join(find_differences()) or 'none: the model computes something else'}"
    )
