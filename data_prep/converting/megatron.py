"""Megatron's indexed data set, which gpt-neox has too: NAME.bin with the tokens, NAME.idx with what they are.

The index: `MMIDIDX\\0\\0`, version 1 (uint64), a code of the type (uint8), the numbers of sequences and of document
marks (uint64 each); then lengths (int32) and byte offsets (int64) of the sequences, and the sequence at which each
document begins, and the end (int64). Little-endian. As written by Megatron-LM's `IndexedDatasetBuilder` and gpt-neox's
`MMapIndexedDatasetBuilder`.
"""

import struct
from pathlib import Path

import numpy as np

from data_prep.converting.foreign_file import ForeignTokens, map_tokens, stat_size
from minimind.data.shards import ShardReader
from minimind.errors import UserError
from minimind.files import new_file

_MAGIC = b"MMIDIDX\0\0"
_HEADER = struct.Struct("<9sQBQQ")
# The codes of integers; those of floating point are not the same in both programs, and no tokens.
_DTYPES = {1: "u1", 2: "i1", 3: "<i2", 4: "<i4", 5: "<i8", 8: "<u2"}
_LARGEST_UINT16 = 65_500  # vocabularies below are written as uint16 there, larger ones as int32


def open_megatron(prefix: Path) -> ForeignTokens:
    """The documents of `prefix`.bin and `prefix`.idx; sequences of one document are joined.

    Raises:
        UserError: a file is missing, damaged, or holds no tokens of text.
    """
    path = prefix.with_name(prefix.name + ".idx")
    size = stat_size(path)
    with open(path, "rb") as file:
        data = file.read(_HEADER.size)
    if size < _HEADER.size or data[:9] != _MAGIC:
        raise UserError(f"{path} is no index of Megatron or gpt-neox: it does not begin with MMIDIDX")
    _, version, code, num_sequences, num_marks = _HEADER.unpack(data)
    if version != 1 or code not in _DTYPES:
        raise UserError(f"{path}: version {version} and type {code} are not those of tokens (version 1, an integer)")
    expected = _HEADER.size + 12 * num_sequences + 8 * num_marks
    if size != expected:
        more = ": modes of a multimodal data set, which shards do not hold" if size == expected + num_sequences else ""
        raise UserError(f"{path} has {size:,} bytes, {expected:,} are those of its header{more}")
    index = np.memmap(path, mode="r", offset=_HEADER.size)
    lengths = index[: 4 * num_sequences].view("<i4").astype(np.int64)
    offsets, marks = (part.view("<i8") for part in np.split(index[4 * num_sequences :], [8 * num_sequences]))
    sequence_ends = np.cumsum(lengths)
    dtype = np.dtype(_DTYPES[code])
    if (lengths < 0).any() or (offsets != (sequence_ends - lengths) * dtype.itemsize).any():
        raise UserError(f"{path} is damaged: its sequences do not follow one another")
    if num_marks <= 1:  # gpt-neox's tool that merges files drops them: each sequence is a document
        marks = np.arange(num_sequences + 1)
    if marks[0] != 0 or marks[-1] != num_sequences or (np.diff(marks) < 0).any():
        raise UserError(f"{path} is damaged: its documents do not hold all {num_sequences:,} sequences in order")
    ends = np.append(0, sequence_ends)[marks[1:]]
    tokens = map_tokens(prefix.with_name(prefix.name + ".bin"), dtype, int(sequence_ends[-1]) if num_sequences else 0)
    return ForeignTokens(f"{prefix}.bin", tokens, ends)


def write_megatron(reader: ShardReader, prefix: Path) -> None:
    """All documents of a shard folder, with their end tokens, each one sequence."""
    code, dtype = (8, "<u2") if reader.manifest.vocab_size < _LARGEST_UINT16 else (4, "<i4")
    lengths = []
    with new_file(prefix.with_name(prefix.name + ".bin")) as temporary, open(temporary, "wb") as file:
        for index, shard in enumerate(reader.manifest.shards):
            reader.open_file(index).astype(dtype).tofile(file)
            lengths.append(np.diff(reader.open_file(index, 1), append=shard.tokens))
    sizes = np.concatenate([np.empty(0, np.int64), *lengths])
    offsets = (np.cumsum(sizes) - sizes) * np.dtype(dtype).itemsize
    marks = np.arange(len(sizes) + 1)
    # The index last: without it there is no data set.
    with new_file(prefix.with_name(prefix.name + ".idx")) as temporary, open(temporary, "wb") as file:
        file.write(_HEADER.pack(_MAGIC, 1, code, len(sizes), len(marks)))
        for values, kind in ((sizes, "<i4"), (offsets, "<i8"), (marks, "<i8")):
            values.astype(kind).tofile(file)
