"""The files that nanotron's Nanoset reads and datatrove's `DocumentTokenizer` writes.

NAME.ds has the tokens, uint16 or for a large vocabulary uint32; NAME.ds.index the end of each document in tokens,
uint64; NAME.ds.metadata the tokenizer and the bytes of a token, the number of tokens, and that again for people.
Little-endian.
"""

from pathlib import Path

import numpy as np

from data_prep.converting.foreign_file import ForeignTokens, map_tokens, stat_size
from minimind.data.shards import ShardReader
from minimind.errors import UserError
from minimind.files import new_file, replace_file


def open_nanoset(path: Path) -> ForeignTokens:
    """The documents of one .ds file.

    Raises:
        UserError: it or its index is missing or damaged, or it has a loss mask.
    """
    index = path.with_name(path.name + ".index")
    if path.with_name(path.name + ".loss").exists():
        raise UserError(f"{path} has a loss mask ({path.name}.loss), which shards of text do not hold")
    if stat_size(index) % 8:
        raise UserError(f"{index} is damaged: its size is no multiple of 8 bytes")
    ends = np.fromfile(index, dtype="<u8").astype(np.int64)
    if (np.diff(ends, prepend=0) < 0).any():
        raise UserError(f"{index} is damaged: the ends of documents do not increase")
    num_tokens = int(ends[-1]) if len(ends) else 0
    dtype = np.dtype("<u4" if stat_size(path) == 4 * num_tokens else "<u2")
    return ForeignTokens(str(path), map_tokens(path, dtype, num_tokens), ends)


def write_nanoset(reader: ShardReader, folder: Path) -> None:
    """All documents of a shard folder, with their end tokens: a .ds file for each shard."""
    folder.mkdir(parents=True, exist_ok=True)
    dtype = np.dtype(reader.manifest.dtype).newbyteorder("<")
    for number, shard in enumerate(reader.manifest.shards):
        path = folder / f"{number:05d}_unshuffled.ds"
        with new_file(path) as temporary, open(temporary, "wb") as file:
            reader.open_file(number).astype(dtype).tofile(file)
        ends = np.append(reader.open_file(number, 1)[1:], shard.tokens)
        replace_file(path.with_name(path.name + ".index"), ends.astype("<u8").tobytes())
        metadata = f"{reader.manifest.tokenizer.file}|{dtype.itemsize}\n{shard.tokens}\n{shard.tokens} T"
        replace_file(path.with_name(path.name + ".metadata"), metadata)
