"""Trains a SentencePiece BPE tokenizer on any input of the corpus reader: python -m data_prep.train_tokenizer.

Byte fallback and no normalisation: every valid text comes back exactly. The same input gives the same model file on any
machine.
"""

import hashlib
import io
import itertools
import json
import re
import sys
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import sentencepiece
import tyro
from tqdm import tqdm

from data_prep.reading.documents import BadDocuments, read_documents
from data_prep.reading.records import FRACTION, ReadOptions
from data_prep.reading.sources import resolve_sources
from minimind.cli import parse_flags
from minimind.data.tokenizer import BLANK, CONFIG_NAME, MODEL_NAME, SPECIAL_TOKENS, load_tokenizer
from minimind.errors import UserError, run_main
from minimind.files import disk_errors, replace_file
from minimind.schema import AT_LEAST_1, Limits

UNKNOWN_TOKEN = "<unk>"
_RESERVED_PIECES = len(SPECIAL_TOKENS) + 1 + 256
"""Special tokens, the unknown token that the format demands (byte fallback never uses it), and the bytes."""
SMALLEST_VOCABULARY = _RESERVED_PIECES + 4

_SENTENCE_CHARACTERS = 4000
# Up to a line break, which then begins the next sentence: the library takes line breaks off the end of sentences.
_SENTENCE = re.compile(rf"(?s).{{1,{_SENTENCE_CHARACTERS}}}(?=\n|\Z)|.{{1,{_SENTENCE_CHARACTERS}}}")
_SPECIALS = re.compile("|".join(map(re.escape, SPECIAL_TOKENS)))
# The library would read these as its own space, unknown and boundary marks, or drop the sentence.
_UNTRAINABLE = f"\0\t{BLANK}\u2585"
_CHARACTER_COVERAGE = 0.9995


@dataclass(frozen=True, kw_only=True)
class TrainTokenizerFlags(ReadOptions):
    """Train a tokenizer on text files or data sets."""

    input: tuple[str, ...]
    """Files (.jsonl .ndjson .json .txt .parquet .csv .tsv, also .gz .zst .bz2 .xz), folders, globs, - or hf:NAME."""
    output: Path
    """Folder for tokenizer.model and tokenizer_config.json."""
    vocab_size: Annotated[int, Limits(at_least=SMALLEST_VOCABULARY)] = 6400
    """Number of tokens: special ones, 256 bytes and learnt pieces."""
    max_train_bytes: Annotated[int, AT_LEAST_1] = 100_000_000
    """Learn from at most so much text: a sample spread evenly over a larger input, always the same one."""
    max_bad_fraction: Annotated[float, FRACTION] = 0.01
    """Stop if more than this fraction of the documents is bad."""
    overwrite: bool = False
    """Replace a tokenizer that is already in the output folder."""


def main() -> None:
    flags = parse_flags(
        TrainTokenizerFlags, sys.argv[1:], default=tyro.MISSING_NONPROP, prog="python -m data_prep.train_tokenizer"
    )
    model_file = flags.output / MODEL_NAME
    if model_file.exists() and not flags.overwrite:
        raise UserError(f"{model_file} already exists: choose another --output or give --overwrite")
    sources = resolve_sources(flags.input, default_format=flags.format)
    documents = read_documents(sources, flags, BadDocuments(flags.max_bad_fraction))
    with tqdm(documents, desc="reading", unit=" documents", disable=None) as progress:
        sentences = sample_sentences(cut_sentences(progress), flags.max_train_bytes)
    num_bytes = sum(len(sentence.encode()) for sentence in sentences)
    print(f"training on {num_bytes:,} bytes of text ...", flush=True)
    model = train_tokenizer(sentences, flags.vocab_size)
    save_tokenizer(model, flags.output, flags.vocab_size)
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


def train_tokenizer(sentences: list[str], vocab_size: int) -> bytes:
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
    parts = (part for sentence in sentences for part in sentence.translate(breaks).split("\t"))
    model = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=(part for part in parts if part.strip("\r\n")),
            model_writer=model,
            model_type="bpe",
            vocab_size=vocab_size,
            byte_fallback=True,
            normalization_rule_name="identity",
            add_dummy_prefix=False,
            remove_extra_whitespaces=False,
            allow_whitespace_only_pieces=True,
            split_digits=True,
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
            num_threads=4,  # stands in the model file, so it must not follow the machine
            minloglevel=5,
        )
    except RuntimeError as error:
        raise UserError(_explain(str(error), vocab_size)) from None
    return model.getvalue()


def save_tokenizer(model: bytes, folder: Path, vocab_size: int) -> None:
    """Write `tokenizer.model`, and beside it `tokenizer_config.json` with its size, special tokens and sha256."""
    config = {
        "format_version": 1,
        "type": "sentencepiece",
        "vocab_size": vocab_size,
        "special_tokens": {token: token_id for token_id, token in enumerate(SPECIAL_TOKENS)},
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
