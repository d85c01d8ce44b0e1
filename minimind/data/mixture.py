"""Mixtures of corpora: as a person names them, on the command line or in a file, with a schedule of their shares; and
the windows that they are."""

import dataclasses
import functools
import hashlib
import importlib
import json
import re
from collections.abc import Mapping, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np

from minimind.data.dataset import WHOLE, Dataset, Sample, SequencePart, open_dataset
from minimind.data.manifest import ShardError
from minimind.data.shards import ShardReader
from minimind.errors import UserError
from minimind.files import read_json
from minimind.schema import nearest

FORM = "NAME=DIR:WEIGHT[:max-epochs=N]"
_SOURCE = re.compile(r"(?P<name>[^=:/\s]+)=(?P<folder>.+?):(?P<weight>[^:/]*)(:max-epochs=(?P<max_epochs>[^:/]*))?")


@dataclasses.dataclass(frozen=True)
class NamedShards:
    """A source as it was given."""

    name: str
    folder: str
    weight: Fraction
    max_epochs: Fraction | None = None


def read_mixture(shards: str | tuple[str, ...]) -> tuple[NamedShards, ...] | None:
    """The sources that `shards` names, each `NAME=DIR:WEIGHT[:max-epochs=N]` or in a .json or .yaml file
    `{NAME: {"path": DIR, "weight": WEIGHT, "max_epochs": N}}`; None: it is one plain folder.

    Raises:
        UserError: a source of another form, a name that stands twice, or weights that are none.
    """
    values = (shards,) if isinstance(shards, str) else shards
    if len(values) == 1 and (Path(values[0]).is_dir() or not (_SOURCE.fullmatch(values[0]) or _is_file(values[0]))):
        return None
    if len(values) == 1 and _is_file(values[0]):
        named = _read_file(Path(values[0]))
    else:
        named = [_read_source(value) for value in values]
    names = [source.name for source in named]
    for name in names:
        if names.count(name) > 1:
            raise UserError(f"shards: {name} names two sources; give each a name of its own")
    if not any(source.weight for source in named):
        raise UserError("shards: every weight is 0; give at least one source a share of the tokens")
    return tuple(named)


def _is_file(value: str) -> bool:
    return Path(value).suffix in (".json", ".yaml", ".yml") and "=" not in value


def _read_source(value: str) -> NamedShards:
    match = _SOURCE.fullmatch(value)
    if match is None:
        raise UserError(f"shards: {value} is not {FORM}")
    where = f"shards: {match['name']}"
    most = match["max_epochs"]
    return NamedShards(
        match["name"], match["folder"], _read_weight(match["weight"], where),
        None if most is None else _read_epochs(most, where),
    )  # fmt: skip


def _read_file(path: Path) -> list[NamedShards]:
    content = read_settings(path, "shards")
    named = []
    for name, fields in content.items() if isinstance(content, Mapping) else ():
        where = f"shards: {path}: {name}"
        if not isinstance(fields, Mapping) or not {"path", "weight"} <= set(fields) <= {"path", "weight", "max_epochs"}:
            raise UserError(f'{where}: not {{"path": DIR, "weight": WEIGHT, "max_epochs": N or left out}}')
        most = fields.get("max_epochs")
        limit = None if most is None else _read_epochs(most, where)
        named.append(NamedShards(str(name), str(fields["path"]), _read_weight(fields["weight"], where), limit))
    if not named:
        raise UserError(f"shards: {path} names no source")
    return named


def read_settings(path: Path, what: str) -> Any:
    """The content of a .json, .yaml or .yml file.

    Raises:
        UserError: it cannot be read, or is none.
    """
    if path.suffix == ".json":
        return read_json(path, f"{what}:")
    yaml = importlib.import_module("yaml")  # without types of its own
    try:
        return yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what}: cannot read {path}: {error.strerror}") from None
    except (ValueError, yaml.YAMLError) as error:
        raise UserError(f"{what}: {path} is no YAML: {' '.join(str(error).split())}") from None


def _read_weight(value: Any, where: str) -> Fraction:
    """Exactly what is written: 0.1 is a tenth."""
    weight = _read_number(value)
    if weight is None or weight < 0:
        raise UserError(f"{where}: weight {value} is not a number of 0 or more")
    return weight


def _read_epochs(value: Any, where: str) -> Fraction:
    epochs = _read_number(value)
    if not epochs or epochs < 0:
        raise UserError(f"{where}: max-epochs {value} is not a number above 0")
    return epochs


def _read_number(value: Any) -> Fraction | None:
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        size = abs(float(value))
        return Fraction(str(value)) if size == 0 or 1e-12 <= size <= 1e15 else None
    except ValueError:
        return None


def read_schedule(path: str | None, names: Sequence[str]) -> list[tuple[int, tuple[Fraction, ...]]]:
    """(step from which on, weight of each of `names`) of a .json or .yaml file
    `[{"step": N, "weights": {NAME: WEIGHT}}]`; a source that is not named has none of the tokens there.

    Raises:
        UserError: it is of another form, or names a source that is not there.
    """
    if path is None:
        return []
    content = read_settings(Path(path), "mixture_schedule")
    found: list[tuple[int, tuple[Fraction, ...]]] = []
    where = f"mixture_schedule: {path}"
    for entry in content if isinstance(content, list) else [None]:
        if (
            not isinstance(entry, Mapping)
            or set(entry) != {"step", "weights"}
            or not isinstance(entry["weights"], Mapping)
        ):
            raise UserError(f'{where}: not a list of {{"step": N, "weights": {{NAME: WEIGHT, ...}}}}')
        step, weights = entry["step"], entry["weights"]
        if not isinstance(step, int) or isinstance(step, bool) or step <= (found[-1][0] if found else 0):
            raise UserError(f"{where}: step {step} is not a whole number above {found[-1][0] if found else 0}")
        for name in weights:
            if name not in names:
                raise UserError(f"{where}: step {step}: no source '{name}'{nearest(str(name), list(names))}")
        read = {name: _read_weight(weight, f"{where}: step {step}: {name}") for name, weight in weights.items()}
        if not any(read.values()):
            raise UserError(f"{where}: step {step}: every weight is 0")
        found.append((step, tuple(read.get(name, Fraction(0)) for name in names)))
    return found


@dataclasses.dataclass(frozen=True)
class Source:
    """One of the corpora of a mixture."""

    name: str
    windows: Dataset
    weight: Fraction
    """In proportion to the others', its share of the windows, and so of the tokens, at the beginning."""
    max_epochs: Fraction | None = None
    """Passes over it at most; None: any number."""

    @property
    def num_windows(self) -> int:
        return len(self.windows)

    @property
    def fingerprint(self) -> str:
        return self.windows.fingerprint

    @property
    def most_windows(self) -> int | None:
        """Windows that a run may take of it."""
        return None if self.max_epochs is None else int(self.max_epochs * self.num_windows)


class Mixture(Dataset):
    """The windows of several corpora counted through, one source after the other; each window is of one source. The
    order in which training takes them is that of `minimind.data.mixture_order`.

    Args:
        schedule: (optimizer step, weights of all sources from that step on), by increasing step.
    """

    def __init__(self, sources: Sequence[Source], schedule: Sequence[tuple[int, Sequence[Fraction]]] = ()) -> None:
        self.sources = tuple(sources)
        self.shares = ((0, tuple(source.weight for source in sources)), *((step, tuple(w)) for step, w in schedule))
        """(step from which on, weight of each source), the first from step 0 on."""
        first = self.sources[0].windows
        self.reader = next((reader for reader in self.readers if reader.manifest.is_chat), first.reader)
        """Of one source: what all have in common, such as the tokenizer, and the chat template where one has it."""
        self.seq_len, self.document_mask = first.seq_len, first.document_mask
        self.is_packed = first.is_packed
        self._ends = np.cumsum([source.num_windows for source in self.sources])

    @property
    def readers(self) -> tuple[ShardReader, ...]:
        return tuple(source.windows.reader for source in self.sources)

    @functools.cached_property
    def fingerprint(self) -> str:
        """sha256 over everything that decides which windows come in which order, beside the seed."""
        sources = [[source.fingerprint, str(source.max_epochs)] for source in self.sources]
        shares = [[step, [str(weight / sum(weights)) for weight in weights]] for step, weights in self.shares]
        return hashlib.sha256(json.dumps([sources, shares]).encode()).hexdigest()

    def __len__(self) -> int:
        return int(self._ends[-1])

    def read(self, index: int, part: SequencePart = WHOLE) -> Sample:
        """A part of window `index`, as its source reads it."""
        if not 0 <= index < len(self):
            raise IndexError(f"window {index} of {len(self)}")
        number = int(np.searchsorted(self._ends, index, side="right"))
        source = self.sources[number]
        sample = source.windows.read(index - int(self._ends[number]) + source.num_windows, part)
        return dataclasses.replace(sample, source=number, num_sources=len(self.sources))


def open_mixture(
    named: Sequence[NamedShards],
    readers: Mapping[str, ShardReader],
    schedule: Sequence[tuple[int, tuple[Fraction, ...]]],
    seq_len: int,
    document_mask: bool = False,
    *,
    packed: bool = False,
    keep_tail: bool = False,
) -> Mixture:
    """The mixture of those of `named` that have a reader. Where one holds conversations, the texts of the others stand
    as whole documents in windows too.

    Raises:
        ShardError: two sources do not go together: other tokenizers or chat templates, the same data twice, or pairs.
    """
    first = next(iter(readers.values()))
    packed = packed or any(reader.manifest.is_chat for reader in readers.values())
    kept = [number for number, source in enumerate(named) if source.name in readers]
    templates = {reader.manifest.chat_template_sha256: reader for reader in readers.values() if reader.manifest.is_chat}
    seen: dict[str, str] = {}
    for name, reader in readers.items():
        if reader.manifest.is_pairs:
            raise ShardError(f"shards: {name} holds answers to compare, which are not mixed; give that folder alone")
        if reader.manifest.tokenizer.sha256 != first.manifest.tokenizer.sha256:
            raise ShardError(
                f"shards: {name} ({reader.folder}) has another tokenizer than {first.folder}: its tokens mean "
                "something else; tokenise it again with the same one"
            )
        if (other := seen.setdefault(reader.fingerprint, name)) != name:
            raise ShardError(f"shards: {other} and {name} hold the same tokens; give one of them, with both weights")
    if len(templates) > 1:
        one, two, *_ = templates.values()
        raise ShardError(f"shards: {one.folder} and {two.folder} have different chat templates; prepare one again")
    sources = []
    for source in (named[number] for number in kept):
        windows = open_dataset(readers[source.name], seq_len, document_mask, packed=packed, keep_tail=keep_tail)
        sources.append(Source(source.name, windows, source.weight, source.max_epochs))
    return Mixture(sources, [(step, [weights[number] for number in kept]) for step, weights in schedule])
