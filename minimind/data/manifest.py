"""`manifest.json` of a shard folder.

Every field is checked when a manifest is made or read, so the rest of the data path never meets a wrong one.
"""

import dataclasses
import json
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from pydantic import AfterValidator, ConfigDict, Field, TypeAdapter, ValidationError, model_validator
from pydantic.dataclasses import dataclass

from minimind.errors import UserError
from minimind.files import replace_file

FORMAT_VERSION: Literal[1] = 1
MANIFEST_NAME = "manifest.json"


class ShardError(UserError):
    """A shard folder that is missing, damaged, unfinished or not what its manifest says."""


def _check_name(name: str) -> str:
    # A name that leaves the folder would let a manifest read any file of the machine.
    if name in ("", ".", "..") or set(name) & set("/\\\0"):
        raise ValueError("must be the plain name of a file in the same folder")
    return name


_STRICT = ConfigDict(extra="forbid", strict=True)
FileName = Annotated[str, AfterValidator(_check_name)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Count = Annotated[int, Field(ge=0)]
Positive = Annotated[int, Field(ge=1)]


@dataclass(frozen=True, config=_STRICT)
class TokenizerInfo:
    """The tokenizer that made the shards; `file` lies in the same folder."""

    file: FileName
    sha256: Sha256


@dataclass(frozen=True, config=_STRICT)
class ShardInfo:
    """One shard: its token file, its document file, and what they hold (`bytes` counts the UTF-8 bytes of the text)."""

    file: FileName
    documents_file: FileName
    tokens: Positive
    documents: Positive
    bytes: Count
    sha256: Sha256
    documents_sha256: Sha256

    @model_validator(mode="after")
    def _check(self) -> "ShardInfo":
        if self.documents > self.tokens:
            raise ValueError(f"documents is {self.documents}, more than the {self.tokens} tokens")
        return self


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    """A complete shard folder, the fields in the order in which the file holds them."""

    format_version: Literal[1]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Positive
    eos_token_id: Count
    tokenizer: TokenizerInfo
    total_tokens: Count
    total_documents: Count
    total_bytes: Count
    shards: tuple[ShardInfo, ...]

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        largest = int(np.iinfo(self.dtype).max) + 1
        if self.vocab_size > largest:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at most {largest} with dtype {self.dtype}")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id is {self.eos_token_id}; it must be below {self.vocab_size}")
        files = [name for shard in self.shards for name in (shard.file, shard.documents_file)]
        if len(set(files)) < len(files):
            raise ValueError(f"shards name {max(files, key=files.count)} twice; every file must be named once")
        for name in ("tokens", "documents", "bytes"):
            total, of_shards = getattr(self, f"total_{name}"), sum(getattr(shard, name) for shard in self.shards)
            if total != of_shards:
                raise ValueError(f"total_{name} is {total}; it must be {of_shards}, the sum over the shards")
        return self

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for one token, end tokens included: what turns a loss per token into one per byte."""
        return self.total_bytes / max(1, self.total_tokens)

    def save(self, folder: Path) -> None:
        """Write `manifest.json` in one step: the last file of a folder, and the mark that it is complete."""
        replace_file(folder / MANIFEST_NAME, json.dumps(dataclasses.asdict(self), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check `folder/manifest.json`. Raises `ShardError` naming the file and the first wrong field."""
        path = folder / MANIFEST_NAME
        try:
            return TypeAdapter(cls).validate_json(path.read_bytes())
        except FileNotFoundError:
            raise ShardError(f"{folder} is no finished shard folder: it has no {MANIFEST_NAME}") from None
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror}") from None
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
        field = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in first["loc"]).lstrip(".")
        known = {"missing": "is missing", "unexpected_keyword_argument": f"is unknown in format {FORMAT_VERSION}"}
        found = "" if isinstance(first["input"], (dict, list)) else f"is {first['input']!r}: "
        reason = known.get(first["type"]) or found + first["msg"].removeprefix("Value error, ")
        raise ShardError(f"{path}: {f'field {field} ' if field else ''}{reason}") from None
