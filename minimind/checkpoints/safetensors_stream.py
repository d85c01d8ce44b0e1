"""A safetensors file written one tensor at a time, so that it may be larger than memory.

The format (https://github.com/huggingface/safetensors) puts names, types and places first, which is known before any
tensor is. Knows nothing of what the tensors mean.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path

import torch

_TYPES = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2), torch.float16: ("F16", 2)}


def write_safetensors(
    path: Path,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], torch.Tensor],
    *,
    dtype: torch.dtype = torch.float32,
    exact: Collection[str] = (),
) -> None:
    """Write the tensors `read(name)` of the given shapes as `dtype`, and flush them to the disk. Not atomic.

    Args:
        exact: names of tensors that are written as float32 whatever `dtype` is.

    Raises:
        OSError: the disk is full, or the file cannot be written.
        ValueError: a tensor has another shape than was said.
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        kind, width = _TYPES[torch.float32 if name in exact else dtype]
        begin, end = end, end + math.prod(shape) * width
        header[name] = {"dtype": kind, "shape": list(shape), "data_offsets": [begin, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)  # the data begins at a multiple of 8
    with open(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name, shape in shapes.items():
            tensor = read(name)
            if tuple(tensor.shape) != tuple(shape):
                raise ValueError(f"{name}: {tuple(tensor.shape)} instead of {tuple(shape)}")
            converted = tensor.to(torch.float32 if name in exact else dtype).contiguous()
            file.write(converted.view(torch.uint8).numpy().data)
        file.flush()
        os.fsync(file.fileno())
