"""A folder of safetensors files as the Hugging Face tools lay it out: one file, or shards with an index.

Written one tensor at a time, so a model may be larger than memory; read by name, mapped from the disk.
"""

import json
import math
import os
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from minimind.errors import UserError
from minimind.files import replace_file
from minimind.model.pretrained import WEIGHTS_FILE

WEIGHT_TYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
"""What weights can be: a quantized tensor without its scales would load as wrong numbers."""
_TYPES = {torch.float32: ("F32", 4), torch.bfloat16: ("BF16", 2), torch.float16: ("F16", 2)}

INDEX_FILE = WEIGHTS_FILE + ".index.json"


def write_shards(
    folder: Path,
    shapes: Mapping[str, Sequence[int]],
    read: Callable[[str], Tensor],
    *,
    dtype: torch.dtype,
    max_shard_bytes: int,
    exact: Collection[str] = (),
) -> None:
    """Write the tensors `read(name)`, in their order, into files of at most `max_shard_bytes` (a larger tensor has a
    file of its own) and, where there are several, their index. Not atomic: for a folder that has no name yet.

    Args:
        exact: names of tensors that stay float32.

    Raises:
        OSError: the disk is full, or a file cannot be written.
    """
    sizes = {name: math.prod(shape) * (4 if name in exact else dtype.itemsize) for name, shape in shapes.items()}
    shards = plan_shards(sizes, max_shard_bytes)
    stem, suffix = WEIGHTS_FILE.split(".")
    index: dict[str, str] = {}
    for number, names in enumerate(shards, 1):
        file = WEIGHTS_FILE if len(shards) == 1 else f"{stem}-{number:05d}-of-{len(shards):05d}.{suffix}"
        write_safetensors(folder / file, {name: shapes[name] for name in names}, read, dtype=dtype, exact=exact)
        index |= dict.fromkeys(names, file)
    if len(shards) > 1:
        content = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": index}
        replace_file(folder / INDEX_FILE, json.dumps(content, indent=1) + "\n")


def plan_shards(sizes: Mapping[str, int], max_bytes: int) -> list[list[str]]:
    """Names in their order, cut into runs of at most `max_bytes` together, at least one each."""
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > max_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


class SafetensorsFolder:
    """The tensors of a folder, by name.

    Raises:
        UserError: a file is missing, cut short or no safetensors file, or the index names what is not there.
    """

    def __init__(self, folder: Path) -> None:
        self.where = folder / WEIGHTS_FILE
        index = _read_index(folder)
        if index is None:
            self._file_of = dict.fromkeys(self._open(folder / WEIGHTS_FILE).keys(), WEIGHTS_FILE)
            files = {WEIGHTS_FILE}
        else:
            self.where, self._file_of, files = folder / INDEX_FILE, index, set(index.values())
        self._files = {file: self._open(folder / file) for file in sorted(files)}
        self.shapes: dict[str, tuple[int, ...]] = {}
        for name, file in self._file_of.items():
            try:
                tensor = self._files[file].get_slice(name)
            except SafetensorError:
                raise UserError(f"{folder / file}: tensor {name}, which {INDEX_FILE} names, is not in it") from None
            self.shapes[name] = tuple(tensor.get_shape())
            if tensor.get_dtype() not in WEIGHT_TYPES:
                raise UserError(
                    f"{folder / file}: tensor {name} has type {tensor.get_dtype()}; weights are read as "
                    f"{', '.join(WEIGHT_TYPES)}, not quantized"
                )

    def read(self, name: str) -> Tensor:
        """One tensor, in host memory."""
        return self._files[self._file_of[name]].get_tensor(name)

    @staticmethod
    def _open(path: Path) -> Any:
        try:
            return safe_open(os.fspath(path), framework="pt")
        except (OSError, SafetensorError) as error:
            raise UserError(f"{path}: not readable weights (missing, cut short or damaged): {error}") from None


def _read_index(folder: Path) -> dict[str, str] | None:
    path = folder / INDEX_FILE
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))["weight_map"]
        if not all(isinstance(file, str) and Path(file).name == file for file in index.values()):
            raise ValueError("a file outside the folder")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path}: not a readable index of shards: {error}") from None
    return index


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
