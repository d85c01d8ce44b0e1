"""What a corpus looks like to a person: counts, sources, frequent tokens, documents, and a window as a model sees it.

Reads shards and writes text; knows nothing of training.
"""

import json
from collections.abc import Iterator

import numpy as np

from minimind.data.dataset import IGNORED_LABEL, Dataset
from minimind.data.shards import CORPUS_NAME, SPLITS, ShardReader
from minimind.data.tokenizer import Tokenizer
from minimind.units import format_table

_COUNTED = 1 << 24
_PIECE = 1 << 18
_SHOWN_SOURCES = 20
_SHOWN_POSITIONS = 12
_BACKGROUNDS = (153, 223, 151, 224)  # of xterm's 256 colours: light, so that black can be read on all
_BORDER = "\u2500" * 8


class TokenPainter:
    """Tokens as text in which each can be told from its neighbours: by colour, or by bars where there is none.

    Control characters of the corpus never reach the terminal.
    """

    def __init__(self, tokenizer: Tokenizer, *, colour: bool) -> None:
        self._tokenizer = tokenizer
        self._special = set(tokenizer.special_ids.values())
        self._colour = colour

    def name(self, token: int) -> str:
        """One token in visible characters; bytes that are no whole characters in hexadecimal."""
        data = self._tokenizer.token_bytes(token)
        try:
            text = data.decode()
        except UnicodeDecodeError:
            return "".join(f"<{byte:02x}>" for byte in data)
        return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)

    def paint(self, tokens: np.ndarray, is_target: np.ndarray | None = None) -> str:
        """A line for each line of the text. A token that is no target (none is, without `is_target`: all are alike) is
        dim, or stands in parentheses."""
        parts = []
        for place, token in enumerate(tokens.tolist()):
            name = self.name(token)
            counts = is_target is None or bool(is_target[place])
            if not self._colour:
                parts.append(name if counts else f"({name})")
            elif not counts:
                parts.append(f"\x1b[2m{name}\x1b[0m")
            else:
                style = "7" if token in self._special else f"30;48;5;{_BACKGROUNDS[place % len(_BACKGROUNDS)]}"
                parts.append(f"\x1b[{style}m{name}\x1b[0m")
            if name.endswith("\\n"):
                parts[-1] += "\n"
        return ("" if self._colour else "|").join(parts).rstrip("\n")


def describe_totals(readers: dict[str, ShardReader], tokenizer: Tokenizer) -> str:
    """Counts of each split, and the tokenizer."""
    rows: list[tuple[str, ...]] = [("split", "shards", "documents", "tokens", "text bytes", "bytes/token")]
    for split, reader in readers.items():
        manifest = reader.manifest
        counts = (len(manifest.shards), manifest.total_documents, manifest.total_tokens, manifest.total_bytes)
        rows.append((split, *(f"{count:,}" for count in counts), f"{manifest.bytes_per_token:.3f}"))
    end = tokenizer.decode([tokenizer.eos_token_id])
    words = f"{tokenizer.vocab_size:,} tokens, documents end with {end} ({tokenizer.eos_token_id})"
    return f"{format_table(rows, '>')}\n{tokenizer.file.name}: {words}"


def find_sources(reader: ShardReader) -> list[tuple[str, int, int]]:
    """(input, documents, text bytes) in the order of the stream, from the corpus's record of its inputs; empty where
    there is none, or an older one."""
    path, split = reader.folder.parent / CORPUS_NAME, reader.folder.name
    if split not in SPLITS or not path.exists():
        return []
    corpus = json.loads(path.read_text(encoding="utf-8"))
    inputs = [entry for part in (corpus, *corpus.get("appended", [])) for entry in part["inputs"]]
    found = [(entry["name"], entry.get("splits", {}).get(split, {})) for entry in inputs]
    sources = [(name, counts.get("documents", 0), counts.get("bytes", 0)) for name, counts in found if counts]
    return sources if sum(documents for _, documents, _ in sources) == reader.manifest.total_documents else []


def describe_sources(reader: ShardReader) -> str:
    """Documents, tokens and bytes a token of each input, the largest first; "" where the corpus does not say."""
    first, rows = 0, []
    for name, documents, num_bytes in find_sources(reader):
        tokens = document_offset(reader, first + documents) - document_offset(reader, first)
        rows.append((tokens, documents, num_bytes, name))
        first += documents
    rows.sort(reverse=True)
    lines = [("tokens", "documents", "bytes/token", "source")]
    lines += [
        (f"{tokens:,}", f"{documents:,}", f"{num_bytes / tokens:.3f}", name)
        for tokens, documents, num_bytes, name in rows[:_SHOWN_SOURCES]
    ]
    more = f"\nand {len(rows) - _SHOWN_SOURCES:,} more" if len(rows) > _SHOWN_SOURCES else ""
    return format_table(lines, ">>><") + more if rows else ""


def document_offset(reader: ShardReader, document: int) -> int:
    """The offset in the stream at which a document begins, or for the number of all of them the end."""
    offset = 0
    for index, shard in enumerate(reader.manifest.shards):
        if document < shard.documents:
            return offset + int(reader.open_file(index, 1)[document])
        offset, document = offset + shard.tokens, document - shard.documents
    return offset


def describe_tokens(reader: ShardReader, painter: TokenPainter, count: int) -> str:
    """The `count` most frequent tokens; of a large corpus, in pieces spread evenly over it."""
    step = max(1, -(-reader.num_tokens // _COUNTED)) * _PIECE
    found = np.zeros(reader.manifest.vocab_size, dtype=np.int64)
    for start in range(0, reader.num_tokens, step):
        piece = reader.read(start, min(_PIECE, reader.num_tokens - start))
        found += np.bincount(piece, minlength=len(found))
    total = int(found.sum())
    rows = [("share", "id", "token")]
    rows += [
        (f"{found[token] / total:.2%}", str(token), _quote(painter.name(token)))
        for token in np.argsort(-found, kind="stable")[:count].tolist()
    ]
    used = f"{np.count_nonzero(found):,} of {len(found):,} tokens of the vocabulary are used"
    return f"{format_table(rows, '>><')}\n{used} in the {total:,} counted"


def _quote(name: str) -> str:
    return f'"{name}"'  # a blank is seen


def describe_documents(
    reader: ShardReader, painter: TokenPainter, rng: np.random.Generator, count: int, longest: int
) -> Iterator[str]:
    """Random documents, their first `longest` tokens."""
    total = reader.manifest.total_documents
    for document in sorted(rng.choice(total, size=min(count, total), replace=False).tolist()):
        start, end = document_offset(reader, document), document_offset(reader, document + 1)
        shown = reader.read(start, min(end - start, longest))
        rest = f"\n... {end - start - len(shown):,} more tokens" if len(shown) < end - start else ""
        targets = reader.read_targets(start, len(shown)) > 0 if reader.manifest.is_chat else None
        title = f"{_BORDER} document {document:,}: {end - start:,} tokens{_source_of(reader, document)}"
        yield f"{title}\n{painter.paint(shown, targets)}{rest}"


def _source_of(reader: ShardReader, document: int) -> str:
    first = 0
    for name, documents, _ in find_sources(reader):
        first += documents
        if document < first:
            return f", {name}"
    return ""


def describe_window(dataset: Dataset, painter: TokenPainter, index: int) -> str:
    """One window as the model sees it: its inputs cut at the borders of documents, those alone in colour that the model
    learns to predict; then input and target of a few positions, from about the first that has one."""
    sample = dataset[index]
    # The token at position t is predicted at t - 1, where one is asked for; the last label is no input any more.
    tokens = np.append(sample.input_ids, sample.labels[-1:] if sample.labels[-1] >= 0 else sample.input_ids[-1:])
    is_target = np.append(False, sample.labels != IGNORED_LABEL)
    tokens, is_target = tokens[: dataset.seq_len], is_target[: dataset.seq_len]
    starts = np.array([], dtype=np.int64) if sample.document_starts is None else sample.document_starts
    pieces = [
        f"{_BORDER} from position {first}\n" + painter.paint(part, targets)
        for first, part, targets in zip(
            [0, *starts.tolist()], np.split(tokens, starts), np.split(is_target, starts), strict=True
        )
    ]
    rows = [("position", "input", "", "target", "")]
    first = max(0, int(np.argmax(sample.labels != IGNORED_LABEL)) - 2)
    for position in range(first, min(first + _SHOWN_POSITIONS, dataset.seq_len)):
        token, label = int(sample.input_ids[position]), int(sample.labels[position])
        target = ("-", "none") if label == IGNORED_LABEL else (str(label), _quote(painter.name(label)))
        rows.append((str(position), str(token), _quote(painter.name(token)), *target))
    counted = int(np.count_nonzero(sample.labels != IGNORED_LABEL))
    borders = "attention crosses borders" if sample.document_starts is None else f"borders of documents: {len(starts)}"
    title = f"window {index:,} of {len(dataset):,}: {dataset.seq_len} positions, {counted} targets, {borders}"
    return "\n".join([title, *pieces, "", format_table(rows, ">><><")])
