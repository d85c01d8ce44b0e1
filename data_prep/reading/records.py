"""What a record of an input is, and the options that say how inputs are read: the words shared by all readers.

Knows nothing of files or processes.
"""

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from minimind.errors import UserError

CHUNK_BYTES = 1 << 19

TxtDocuments = Literal["paragraph", "line", "document"]


class Rejected(NamedTuple):
    """In place of a text: why there is none."""

    reason: str


Text = str | bytes | Rejected
Record = tuple[int, Text, int]
"""(line or row number, text, size in bytes or characters)"""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How inputs are read."""

    text_field: str = "text"
    """Field, column or feature that holds a document's text (.jsonl, .json, .csv, .parquet, data sets)."""
    txt_documents: TxtDocuments = "paragraph"
    """What one document is in a .txt file: lines up to a blank line, one line, or the whole file."""
    max_document_bytes: int = 1 << 23
    """A longer line or document is bad input; no more than this is ever held."""
    hf_config: str | None = None
    """Configuration of a data set that `datasets` loads."""
    hf_split: str = "train"
    """Split of a data set that `datasets` loads."""
    hf_streaming: bool = True
    """Stream a data set instead of downloading it whole first."""


def find_text(value: Any, field: str) -> Text:
    """The text of a parsed JSON value."""
    if not isinstance(value, dict):
        return Rejected(f"{_name_type(value)}, not an object with a field {field!r}")
    if field not in value:
        return Rejected(f"no field {field!r} (it has {', '.join(map(repr, list(value)[:8])) or 'none'})")
    text = value[field]
    return text if isinstance(text, str) else Rejected(f"field {field!r} is {_name_type(text)}, not a string")


def reject_long(limit: int) -> Rejected:
    """For a document that is too long. Its size may not be known: it is not read to the end everywhere."""
    return Rejected(f"longer than --max-document-bytes {limit:,}")


_JSON_TYPES = {
    dict: "an object",
    list: "a list",
    str: "a string",
    int: "a number",
    float: "a number",
    bool: "true or false",
    type(None): "null",
}


def _name_type(value: object) -> str:
    return _JSON_TYPES.get(type(value), type(value).__name__)


def find_column(columns: list[str], name: str, field: str) -> int:
    """The index of the text column of input `name`. Raises `UserError` with the columns that there are."""
    if field not in columns:
        raise UserError(f"{name} has no column {field!r} but {', '.join(columns)}: choose with --text-field")
    return columns.index(field)
