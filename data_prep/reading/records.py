"""Options of reading, and records: the text of a document, or why there is none."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Literal, get_type_hints

from minimind.errors import UserError
from minimind.schema import Limits, convert

CHUNK_BYTES = 1 << 19
FRACTION = Limits(at_least=0, at_most=1)

TxtDocuments = Literal["paragraph", "line", "document"]
InputFormat = Literal["jsonl", "json", "txt", "parquet", "csv", "tsv", "warc"]


class Rejected(Exception):
    """In place of a text: why there is none."""


class FormedText(str):
    """The text of a document that knows the form of the record it was found in."""

    form: str

    @classmethod
    def of(cls, text: str, form: str) -> "FormedText":
        made = cls(text)
        made.form = form
        return made


Text = str | bytes | Rejected
Record = tuple[int, Text]
"""(line or row number, text)"""


@dataclass(frozen=True, kw_only=True)
class ReadOptions:
    """How inputs are read."""

    text_field: tuple[str, ...] = ("text",)
    """Field, column or feature with the text; several are joined by a blank line, dots lead into nested ones."""
    format: InputFormat | None = None
    """Format of standard input (-), pipes, and files whose name tells none."""
    encoding: str = "utf-8"
    """Encoding of text files, such as gb18030; a UTF-16 byte order mark is recognised without it."""
    txt_documents: TxtDocuments = "paragraph"
    """What one document is in a .txt file: lines up to a blank line, one line, or the whole file."""
    max_document_bytes: Annotated[int, Limits(at_least=1, at_most=1 << 31)] = 1 << 23
    """A longer line or document is bad input; no more than this is held, but of CSV and Parquet."""
    hf_config: str | None = None
    """Configuration of a data set that `datasets` loads."""
    hf_split: str = "train"
    """Split of a data set that `datasets` loads."""
    hf_revision: str | None = None
    """Branch, tag or commit of a data set on the hub."""
    hf_streaming: bool = True
    """Stream a data set instead of downloading it whole first."""

    reads_whole_records: ClassVar[bool] = False
    """Whether a document is made of all fields of a record: an input without fields has none."""

    def __post_init__(self) -> None:
        for name, hint in get_type_hints(type(self), include_extras=True).items():
            if any(isinstance(note, Limits) for note in getattr(hint, "__metadata__", ())):
                convert(getattr(self, name), hint, f"--{name.replace('_', '-')}")
        if not all(self.text_field or [""]) and not self.reads_whole_records:
            raise UserError("--text-field: no field is named")
        try:
            b"text".decode(self.encoding, "replace")
        except (LookupError, UnicodeError):  # unknown, or no encoding of text, such as base64 and idna
            raise UserError(
                f"--encoding {self.encoding} is unknown: give one such as gb18030, big5 or utf-16"
            ) from None

    def find_text(self, record: Any) -> "str | Rejected":
        """The text of the document in a parsed record."""
        return find_text(record, self.text_field)


def find_text(value: Any, fields: Sequence[str]) -> str | Rejected:
    """The text of a parsed JSON value; fields that are empty are left out of several."""
    try:
        found = [_follow(value, field) for field in fields]
    except Rejected as rejected:
        return rejected.with_traceback(None)
    return found[0] if len(found) == 1 else "\n\n".join(text for text in found if text.strip())


def _follow(value: Any, path: str) -> str:
    """The string at a dotted path; a list on the way gives one line for each of its elements."""
    if not isinstance(value, dict):
        raise Rejected(f"{_name_type(value)}, not an object with a field {path!r}")
    head, dot, rest = path.partition(".")
    if path not in value and dot and head in value:
        inner = value[head]
        return "\n".join(_follow(item, rest) for item in inner) if isinstance(inner, list) else _follow(inner, rest)
    if path not in value:
        raise Rejected(f"no field {path!r} (it has {', '.join(map(repr, list(value)[:8])) or 'none'})")
    if not isinstance(value[path], str):
        raise Rejected(f"field {path!r} is {_name_type(value[path])}, not a string")
    return value[path]


def reject_long(limit: int) -> Rejected:
    """For a document that is too long. Its size may not be known: it is not read to the end everywhere."""
    return Rejected(f"longer than --max-document-bytes {limit:,}")


def _name_type(value: object) -> str:
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), type(value).__name__)


def find_columns(columns: Sequence[str], name: str, fields: Sequence[str]) -> list[int]:
    """The indices of the columns of input `name` that hold `fields`, of all columns if none is named.
    Raises `UserError` with the columns there are."""
    found = [] if fields else list(range(len(columns)))
    for field in fields:
        column = field if field in columns else field.split(".")[0]
        if column not in columns:
            raise UserError(f"{name} has no column {field!r} but {', '.join(columns)}: choose with --text-field")
        if list(columns).count(column) > 1:
            raise UserError(f"{name} has several columns {column!r}: give each a name of its own")
        found.append(list(columns).index(column))
    return found
