"""`manifest.json` of a shard folder.

Every field is checked when a manifest is made or read, so the rest of the data path never meets a wrong one.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from minimind.errors import UserError
from minimind.files import replace_file

FORMAT_VERSION = 1
MANIFEST_NAME = "manifest.json"
DTYPES = ("uint16", "uint32")


class ShardError(UserError):
    """A shard folder that is missing, damaged, unfinished or not what its manifest says."""


@dataclasses.dataclass(frozen=True)
class TokenizerInfo:
    """The tokenizer that made the shards; `file` lies in the same folder."""

    file: str
    sha256: str


@dataclasses.dataclass(frozen=True)
class ShardInfo:
    """One shard: its token file, its document file, and what they hold (`bytes` counts the UTF-8 bytes of the text)."""

    file: str
    documents_file: str
    tokens: int
    documents: int
    bytes: int
    sha256: str
    documents_sha256: str


@dataclasses.dataclass(frozen=True)
class Manifest:
    """A complete shard folder. Raises `ShardError` on any field that cannot be true."""

    dtype: str
    vocab_size: int
    eos_token_id: int
    tokenizer: TokenizerInfo
    total_tokens: int
    total_documents: int
    total_bytes: int
    shards: tuple[ShardInfo, ...]
    format_version: int = FORMAT_VERSION

    def __post_init__(self) -> None:
        _check(self.format_version == FORMAT_VERSION, "format_version", self.format_version, f"{FORMAT_VERSION}")
        _check(self.dtype in DTYPES, "dtype", self.dtype, f"one of {', '.join(DTYPES)}")
        _check_count(self, "vocab_size", minimum=1)
        largest = int(np.iinfo(self.dtype).max) + 1
        _check(self.vocab_size <= largest, "vocab_size", self.vocab_size, f"at most {largest} with dtype {self.dtype}")
        _check_count(self, "eos_token_id")
        _check(self.eos_token_id < self.vocab_size, "eos_token_id", self.eos_token_id, f"below {self.vocab_size}")
        _check_file(self.tokenizer, "file", "tokenizer.")
        _check_hash(self.tokenizer, "sha256", "tokenizer.")
        names: set[str] = set()
        for index, shard in enumerate(self.shards):
            _check_shard(shard, f"shards[{index}].")
            _check(shard.file not in names, f"shards[{index}].file", shard.file, "named once")
            names.add(shard.file)
        for name in ("tokens", "documents", "bytes"):
            _check_count(self, f"total_{name}")
            total, of_shards = getattr(self, f"total_{name}"), sum(getattr(shard, name) for shard in self.shards)
            _check(total == of_shards, f"total_{name}", total, f"{of_shards}, the sum over the shards")

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for one token, end tokens included: what turns a loss per token into one per byte."""
        return self.total_bytes / max(1, self.total_tokens)

    def to_dict(self) -> dict[str, Any]:
        """Plain values in the order in which the file holds them."""
        fields = dataclasses.asdict(self)
        return {"format_version": fields.pop("format_version"), **fields, "shards": list(fields["shards"])}

    @classmethod
    def from_dict(cls, fields: Any) -> "Manifest":
        """The manifest that these JSON values describe. Raises `ShardError` on a missing, unknown or wrong field."""
        values = _take_fields(cls, fields, "")
        if not isinstance(values["shards"], (list, tuple)):
            raise ShardError(f"manifest field shards is {type(values['shards']).__name__}; it must be a list")
        shards = [ShardInfo(**_take_fields(ShardInfo, s, f"shards[{i}].")) for i, s in enumerate(values["shards"])]
        tokenizer = TokenizerInfo(**_take_fields(TokenizerInfo, values["tokenizer"], "tokenizer."))
        return cls(**{**values, "tokenizer": tokenizer, "shards": tuple(shards)})

    def save(self, folder: Path) -> None:
        """Write `manifest.json` in one step: the last file of a folder, and the mark that it is complete."""
        replace_file(folder / MANIFEST_NAME, json.dumps(self.to_dict(), indent=1) + "\n")

    @classmethod
    def load(cls, folder: Path) -> "Manifest":
        """Read and check `folder/manifest.json`. Raises `ShardError` naming the file."""
        path = folder / MANIFEST_NAME
        try:
            return cls.from_dict(json.loads(path.read_text(encoding="utf-8")))
        except FileNotFoundError:
            raise ShardError(f"{folder} is no finished shard folder: it has no {MANIFEST_NAME}") from None
        except OSError as error:
            raise ShardError(f"cannot read {path}: {error.strerror}") from None
        except ValueError as error:  # broken JSON or broken UTF-8
            raise ShardError(f"{path} is not JSON: {error}") from None
        except ShardError as error:
            raise ShardError(f"{path}: {error}") from None


def _take_fields(cls: type, fields: Any, prefix: str) -> dict[str, Any]:
    if not isinstance(fields, Mapping):
        what = f"manifest field {prefix.rstrip('.')}" if prefix else "the manifest"
        raise ShardError(f"{what} is {type(fields).__name__}; it must be an object")
    known = [field.name for field in dataclasses.fields(cls)]
    for name in known:
        if name not in fields:
            raise ShardError(f"manifest field {prefix}{name} is missing")
    for name in fields:
        if name not in known:
            raise ShardError(
                f"manifest field {prefix}{name} is unknown; format {FORMAT_VERSION} has {', '.join(known)}"
            )
    return dict(fields)


def _check(holds: bool, field: str, value: object, must_be: str) -> None:
    if not holds:
        raise ShardError(f"manifest field {field} is {value!r}; it must be {must_be}")


def _check_count(owner: object, name: str, prefix: str = "", minimum: int = 0) -> None:
    value = getattr(owner, name)
    whole = isinstance(value, int) and not isinstance(value, bool) and value >= minimum
    _check(whole, prefix + name, value, f"a whole number of at least {minimum}")


def _check_hash(owner: object, name: str, prefix: str) -> None:
    value = getattr(owner, name)
    is_hash = isinstance(value, str) and re.fullmatch("[0-9a-f]{64}", value) is not None
    _check(is_hash, prefix + name, value, "a sha256 in 64 hexadecimal digits")


def _check_file(owner: object, name: str, prefix: str) -> None:
    value = getattr(owner, name)
    # A name that leaves the folder would let a manifest read any file of the machine.
    plain = isinstance(value, str) and value not in ("", ".", "..") and not set(value) & set("/\\\0")
    _check(plain, prefix + name, value, "the plain name of a file in the same folder")


def _check_shard(shard: ShardInfo, prefix: str) -> None:
    _check_file(shard, "file", prefix)
    _check_file(shard, "documents_file", prefix)
    _check_count(shard, "tokens", prefix, minimum=1)
    _check_count(shard, "documents", prefix, minimum=1)
    _check_count(shard, "bytes", prefix)
    _check(
        shard.documents <= shard.tokens, f"{prefix}documents", shard.documents, f"at most {shard.tokens}, its tokens"
    )
    _check_hash(shard, "sha256", prefix)
    _check_hash(shard, "documents_sha256", prefix)
