"""Trains a SentencePiece BPE tokenizer on any input of the corpus reader: python -m data_prep.train_tokenizer.

Byte fallback and no normalisation: every valid text comes back exactly. No token goes on behind a line break, so a text
that is cut there, such as a conversation at its answers, has the ids of the whole. The same input gives the same model
file on any machine.
"""

import hashlib
import importlib
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import sentencepiece
import tokenizers
import tyro
from tqdm import tqdm

from data_prep.reading.documents import BadDocuments, read_documents
from data_prep.reading.records import FRACTION, ReadOptions
from data_prep.reading.sources import resolve_sources
from minimind.cli import parse_flags
from minimind.data.chat_template import TEMPLATE_NAME
from minimind.data.tokenizer import (
    BLANK,
    CONFIG_NAME,
    CONTENT_MARKS,
    MODEL_NAME,
    SPECIAL_TOKENS,
    Tokenizer,
    load_tokenizer,
)
from minimind.errors import UserError, run_main
from minimind.files import disk_errors, replace_file
from minimind.schema import AT_LEAST_1, Limits

UNKNOWN_TOKEN = "<unk>"
_RESERVED_PIECES = len(SPECIAL_TOKENS) + 1 + len(CONTENT_MARKS) + 256
"""Special tokens, the unknown token that the format demands (byte fallback never uses it), marks, and the bytes."""
SMALLEST_VOCABULARY = _RESERVED_PIECES + 4

_SENTENCE_CHARACTERS = 4000
_SENTENCE = re.compile(rf"(?s).{{1,{_SENTENCE_CHARACTERS}}}(?:(?<=\n)|\Z)|.{{1,{_SENTENCE_CHARACTERS}}}")
"""Up to the end of a line, if there is one."""
_SPECIALS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS + CONTENT_MARKS)))
_LINE_BREAK = "\u240a"
"""Stands for a line break in what the library learns from, as it takes line breaks off the end of sentences."""
# The library would read these as its own space, unknown and boundary marks, or drop the sentence.
_UNTRAINABLE = f"\0\t{BLANK}\u2585{_LINE_BREAK}"
_CHARACTER_COVERAGE = 0.9995
_CONTROL = 3
"""Type of a piece that no text becomes."""


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerFlags(ReadOptions):
    """Train a tokenizer on text files or data sets, or add tokens to one."""

    input: tuple[str, ...] = ()
    """Files (.jsonl .ndjson .json .txt .parquet .csv .tsv .warc .wet, also .gz .zst .bz2 .xz), folders, globs, -,
    hf:NAME, or addresses such as s3://bucket/text."""
    output: Path
    """Folder for tokenizer.model and tokenizer_config.json."""
    vocab_size: Annotated[int, Limits(at_least=SMALLEST_VOCABULARY)] = 6400
    """Number of tokens: special ones, 256 bytes and learnt pieces."""
    max_train_bytes: Annotated[int, AT_LEAST_1] = 100_000_000
    """Learn from at most so much text: a sample spread evenly over a larger input, always the same one."""
    max_bad_fraction: Annotated[float, FRACTION] = 0.01
    """Stop if more than this fraction of the documents is bad."""
    split_digits: bool = True
    """Each digit is a token of its own: without it, fewer tokens a text, and a small model learns less from each."""
    split_scripts: bool = True
    """No token goes on from letters to punctuation or to another script: without it, code, tables and markup have far
    fewer tokens, but a small model learns less from each."""
    add_special_token: tuple[str, ...] = ()
    """Tokens to add behind all others, such as <|fim|>: to the one that is trained, or to that of --tokenizer."""
    tokenizer: Path | None = None
    """In place of --input: the tokenizer, of whatever kind, that --add-special-token grows."""
    overwrite: bool = False
    """Replace a tokenizer that is already in the output folder."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.tokenizer is None) != bool(self.input):
            raise UserError("give either --input to train a tokenizer, or --tokenizer with --add-special-token")
        if self.tokenizer is not None and not self.add_special_token:
            raise UserError("--tokenizer: name the tokens that it is to get with --add-special-token")


def main() -> None:
    flags = parse_flags(
        TrainTokenizerFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.train_tokenizer"
    )
    if flags.tokenizer is not None:
        grow_tokenizer(load_tokenizer(flags.tokenizer), flags.add_special_token, flags.output, flags.overwrite)
        return
    model_file = flags.output / MODEL_NAME
    _check_free(model_file, flags.overwrite)
    sources = resolve_sources(flags.input, default_format=flags.format)
    documents = read_documents(sources, flags, BadDocuments(flags.max_bad_fraction))
    with tqdm(documents, desc="reading", unit=" documents", disable=None) as progress:
        sentences = sample_sentences(cut_sentences(progress), flags.max_train_bytes)
    num_bytes = sum(len(sentence.encode()) for sentence in sentences)
    print(f"training on {num_bytes:,} bytes of text ...", flush=True)
    added = flags.add_special_token
    size, splits = flags.vocab_size - len(added), (flags.split_digits, flags.split_scripts)
    model = add_pieces(train_tokenizer(sentences, size, *splits), added)
    save_tokenizer(model, flags.output)
    tokens = load_tokenizer(model_file).encode_batch(sentences[:1000])
    ratio = sum(len(s.encode()) for s in sentences[:1000]) / max(sum(map(len, tokens)), 1)
    print(f"{model_file}: {flags.vocab_size} tokens, {ratio:.2f} bytes a token")


def cut_sentences(documents: Iterable[str]) -> Iterator[str]:
    """Training text in pieces of bounded length, without special tokens: those have their ids already."""
    for document in documents:
        for part in _SPECIALS.split(document):
            yield from _SENTENCE.findall(part)


def sample_sentences(sentences: Iterable[str], max_bytes: int) -> list[str]:
    """All sentences if they fit into `max_bytes`, else those whose hash is below a limit that makes them fit.

    One pass, memory for `max_bytes` of text, and the choice depends on the sentences alone.
    """
    limit = 1 << 64
    kept: list[tuple[int, str]] = []
    total = 0
    for sentence in sentences:
        data = sentence.encode()
        rank = int.from_bytes(hashlib.blake2b(data, digest_size=8).digest(), "big")
        if rank < limit:
            kept.append((rank, sentence))
            total += len(data)
        while total > max_bytes:
            limit //= 2
            kept = [(rank, sentence) for rank, sentence in kept if rank < limit]
            total = sum(len(sentence.encode()) for _, sentence in kept)
    return [sentence for _, sentence in kept]


def train_tokenizer(
    sentences: list[str], vocab_size: int, split_digits: bool = True, split_scripts: bool = True
) -> bytes:
    """The SentencePiece model file of a BPE vocabulary.

    Rare characters (beyond 99.95% of the text, or beyond half of the vocabulary) are left to byte tokens.

    Raises:
        UserError: there is too little text for so large a vocabulary, or none.
    """
    characters: Counter[str] = Counter()
    for sentence in sentences:
        characters.update(sentence)
    alphabet = _choose_alphabet(characters, (vocab_size - _RESERVED_PIECES) // 2)
    breaks = {ord(c): "\t" for c in [*characters, *_UNTRAINABLE] if c not in alphabet}
    breaks[ord("\n")] = f"{_LINE_BREAK}\t"
    parts = (part for sentence in sentences for part in sentence.translate(breaks).split("\t"))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for part in parts if part.strip(f"\r{_LINE_BREAK}")),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_by_unicode_script=split_scripts,
            split_digits=split_digits,
            max_sentencepiece_length=16 if split_scripts else 20,
            character_coverage=1.0,
            # Without a piece for the space, a space would be written as the bytes of the mark that stands for it.
            required_chars=BLANK,
            max_sentence_length=8 * _SENTENCE_CHARACTERS,
            pad_id=0,
            bos_id=1,
            eos_id=2,
            unk_id=3,
            pad_piece=SPECIAL_TOKENS[0],
            bos_piece=SPECIAL_TOKENS[1],
            eos_piece=SPECIAL_TOKENS[2],
            unk_piece=UNKNOWN_TOKEN,
            control_symbols=list(CONTENT_MARKS),
            num_threads=4,  # stands in the model file, so it must not follow the machine
            minloglevel=5,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    trained = _parse_model(model.getvalue())
    for piece in trained.pieces:
        piece.piece = piece.piece.replace(_LINE_BREAK, "\n")
    return trained.SerializeToString(deterministic=True)


def add_pieces(model: bytes, tokens: Sequence[str]) -> bytes:
    """A SentencePiece model with more special tokens behind its own."""
    grown = _parse_model(model)
    _check_new(tokens, [piece.piece for piece in grown.pieces])
    for token in tokens:
        grown.pieces.add(piece=token, score=0.0, type=_CONTROL)
    return grown.SerializeToString(deterministic=True)


def grow_tokenizer(tokenizer: Tokenizer, tokens: Sequence[str], folder: Path, overwrite: bool) -> None:
    """Write a tokenizer with more special tokens, their ids behind all others, and what lies beside it.

    Raises:
        UserError: it has one of the tokens already, or `folder` has a tokenizer.
    """
    file = folder / tokenizer.file.name
    _check_free(file, overwrite)
    _check_new(tokens, [*tokenizer.special_ids, *tokenizer.mark_ids])
    data, is_own = tokenizer.file.read_bytes(), file.suffix == ".model"
    if is_own:
        save_tokenizer(add_pieces(data, tokens), folder)
    else:
        grown = tokenizers.Tokenizer.from_str(data.decode())
        grown.add_special_tokens([tokenizers.AddedToken(token, normalized=False) for token in tokens])
        with disk_errors(folder):
            folder.mkdir(parents=True, exist_ok=True)
            replace_file(file, grown.to_str(pretty=True))
    for name in [TEMPLATE_NAME] if is_own else [TEMPLATE_NAME, CONFIG_NAME]:
        if (tokenizer.file.parent / name).is_file():
            replace_file(folder / name, (tokenizer.file.parent / name).read_bytes())
    ids = load_tokenizer(file).special_ids
    print(f"{file}: " + ", ".join(f"{token} is id {ids[token]}" for token in tokens))


def _parse_model(model: bytes) -> Any:
    # Its module is generated, and known to no type checker.
    return importlib.import_module("sentencepiece.sentencepiece_model_pb2").ModelProto.FromString(model)


def _check_new(tokens: Sequence[str], known: Sequence[str]) -> None:
    for place, token in enumerate(tokens):
        if not token.strip():
            raise UserError("--add-special-token: a token has no text")
        if token in known or token in tokens[:place]:
            raise UserError(f"--add-special-token {token}: the tokenizer has this token already")


def _check_free(file: Path, overwrite: bool) -> None:
    if file.exists() and not overwrite:
        raise UserError(f"{file} already exists: choose another --output or give --overwrite")


def save_tokenizer(model: bytes, folder: Path) -> None:
    """Write `tokenizer.model`, and beside it `tokenizer_config.json` with its size, special tokens and sha256."""
    pieces = _parse_model(model).pieces
    config = {
        "format_version": 1,
        "type": "sentencepiece",
        "vocab_size": len(pieces),
        "special_tokens": {piece.piece: token_id for token_id, piece in enumerate(pieces) if piece.type == _CONTROL},
        "sha256": hashlib.sha256(model).hexdigest(),
    }
    with disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / CONFIG_NAME).unlink(missing_ok=True)  # a crash must not leave one that belongs to another model
        replace_file(folder / MODEL_NAME, model)
        replace_file(folder / CONFIG_NAME, json.dumps(config, indent=1) + "\n")


def _choose_alphabet(characters: Counter[str], max_size: int) -> set[str]:
    """The most frequent characters; between equally frequent ones the code point decides."""
    total, missing = characters.total(), (1 - _CHARACTER_COVERAGE) * characters.total()
    ranked = sorted(characters.items(), key=lambda item: (-item[1], item[0]))[:max_size]
    covered = itertools.accumulate((count for _, count in ranked), initial=0)
    chosen = {item[0] for item, before in zip(ranked, covered, strict=False) if total - before > missing}
    return chosen - {*_UNTRAINABLE}


def _explain(error: str, vocab_size: int) -> str:
    if match := re.search(r"Vocabulary size too high .* value <= (\d+)", error):
        if int(match[1]) < SMALLEST_VOCABULARY:
            return "there is too little text to train a tokenizer on, of whatever size"
        return f"--vocab-size {vocab_size} is too large for this little text: give more text, or at most {match[1]}"
    if "sentences_.empty()" in error:
        return "the input has no text to train a tokenizer on"
    return f"SentencePiece cannot train on this input: {error.splitlines()[0]}"


if __name__ == "__main__":
    run_main(main)
