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

FORMAT_VERSION: Literal[2] = 2
"""Of conversations, which have targets; corpora of text are written as version 1, and read alike."""
MANIFEST_NAME = "manifest.json"
TARGET, REJECTED_TARGET, REJECTED_START, DISLIKED_TARGET = 1, 2, 3, 4
"""Values of the targets file, 0 for all other tokens: a trained token (of a pair: of the preferred answer), one of the
rejected answer, and the token that begins the rejected conversation. Feedback has an answer that was liked (1) or not
(4), and in place of the rejected conversation the question with the answer to another one."""
DocumentKind = Literal["preferences", "feedback"]


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
    """One shard: its token file, its document file, and what they hold (`bytes` counts the UTF-8 bytes of the text).
    Conversations have a third file, which says of each token whether it is trained."""

    file: FileName
    documents_file: FileName
    tokens: Positive
    documents: Positive
    bytes: Count
    sha256: Sha256
    documents_sha256: Sha256
    targets_file: FileName | None = None
    targets_sha256: Sha256 | None = None

    @model_validator(mode="after")
    def _check(self) -> "ShardInfo":
        if self.documents > self.tokens:
            raise ValueError(f"documents is {self.documents}, more than the {self.tokens} tokens")
        if (self.targets_file is None) != (self.targets_sha256 is None):
            raise ValueError("targets_file and targets_sha256 are given together or not at all")
        return self

    @property
    def files(self) -> list[str]:
        """The names of its files."""
        return [name for name in (self.file, self.documents_file, self.targets_file) if name is not None]

    def arrays(self, dtype: str) -> list[tuple[str, str, int]]:
        """(file, dtype, length) of its files, `dtype` being that of the tokens."""
        found = [(self.file, dtype, self.tokens), (self.documents_file, "int64", self.documents)]
        return found if self.targets_file is None else [*found, (self.targets_file, "uint8", self.tokens)]


@dataclass(frozen=True, config=_STRICT)
class Manifest:
    """A complete shard folder, the fields in the order in which the file holds them."""

    format_version: Literal[1, 2]
    dtype: Literal["uint16", "uint32"]
    vocab_size: Positive
    eos_token_id: Count
    tokenizer: TokenizerInfo
    total_tokens: Count
    total_documents: Count
    total_bytes: Count
    shards: tuple[ShardInfo, ...]
    chat_template_sha256: Sha256 | None = None
    kind: DocumentKind | None = None
    """Each document is a pair of conversations; None: it is one, or plain text."""
    parts: tuple[Count, ...] | None = None
    """How many shards each preparation brought, of a corpus that grew; None: one preparation made all."""

    @model_validator(mode="after")
    def _check(self) -> "Manifest":
        largest = int(np.iinfo(self.dtype).max) + 1
        if self.vocab_size > largest:
            raise ValueError(f"vocab_size is {self.vocab_size}; it must be at most {largest} with dtype {self.dtype}")
        if self.eos_token_id >= self.vocab_size:
            raise ValueError(f"eos_token_id is {self.eos_token_id}; it must be below {self.vocab_size}")
        is_chat = self.format_version == FORMAT_VERSION
        if {is_chat} != {self.chat_template_sha256 is not None, *(s.targets_file is not None for s in self.shards)}:
            raise ValueError("targets and a chat template come with format_version 2, and only with it")
        if self.kind is not None and not is_chat:
            raise ValueError(f"{self.kind}: has targets and a chat template")
        files = [name for shard in self.shards for name in shard.files]
        if len(set(files)) < len(files):
            raise ValueError(f"shards name {max(files, key=files.count)} twice; every file must be named once")
        if self.parts is not None and sum(self.parts) != len(self.shards):
            raise ValueError(f"parts have {sum(self.parts)} shards; they must have {len(self.shards)}, all there are")
        for name in ("tokens", "documents", "bytes"):
            total, of_shards = getattr(self, f"total_{name}"), sum(getattr(shard, name) for shard in self.shards)
            if total != of_shards:
                raise ValueError(f"total_{name} is {total}; it must be {of_shards}, the sum over the shards")
        return self

    @property
    def is_chat(self) -> bool:
        """Whether the documents are conversations, of which some tokens are targets."""
        return self.chat_template_sha256 is not None

    @property
    def is_pairs(self) -> bool:
        """Whether a document is two conversations: see `TARGET` and what follows it."""
        return self.kind is not None

    @property
    def bytes_per_token(self) -> float:
        """UTF-8 bytes of text for one token, end tokens included: what turns a loss per token into one per byte."""
        return self.total_bytes / max(1, self.total_tokens)

    def with_shards(self, shards: tuple[ShardInfo, ...], parts: tuple[int, ...] | None) -> "Manifest":
        """The same corpus with these shards."""
        totals = {
            f"total_{name}": sum(getattr(shard, name) for shard in shards) for name in ("tokens", "documents", "bytes")
        }
        return dataclasses.replace(self, shards=shards, parts=parts, **totals)

    def first_parts(self, count: int) -> "Manifest":
        """The corpus as it was when it had `count` parts. Raises `ShardError` if it never had so many."""
        parts = self.parts or (len(self.shards),)
        if count > len(parts):
            raise ShardError(f"corpus_parts {count}: the corpus has {len(parts)}; give at most {len(parts)}")
        return self.with_shards(self.shards[: sum(parts[:count])], parts[:count] if count > 1 else None)

    def save(self, folder: Path) -> None:
        """Write `manifest.json` in one step: the last file of a folder, and the mark that it is complete."""
        content = dataclasses.asdict(self, dict_factory=_without_none)
        replace_file(folder / MANIFEST_NAME, json.dumps(content, indent=1) + "\n")

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


def _without_none(items: list[tuple[str, object]]) -> dict[str, object]:
    return {name: value for name, value in items if value is not None}
