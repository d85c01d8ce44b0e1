"""Text to token ids and back, for SentencePiece models and Hugging Face `tokenizer.json` files alike.

Decoding gives the encoded text back exactly, whatever valid Unicode it is; a foreign `tokenizer.json` keeps its own
rules, and its ids are those of its library for the whole text.
"""

import abc
import functools
import hashlib
import json
import re
from array import array
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from minimind.data.sentencepiece_words import words_pattern
from minimind.errors import UserError, first_line
from minimind.files import read_json

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The tokens that every tokenizer of this project has, with ids 0, 1 and 2."""
CONTENT_MARKS = (
    *("<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<think>", "</think>"),
    *(f"<|buffer{number}|>" for number in range(1, 10)),
)
"""Tokens that MiniMind has beside them, for tools and thinking, and spare ones for what a later stage needs."""
_END_TOKENS = re.compile(r"(?i)</s>|<\|endoftext\|>|<[|｜]?end[_▁]of[_▁](text|sentence)[|｜]?>|[<\[]\|?eos\|?[>\]]")
"""Names of the token that ends a document in other people's tokenizers."""
MODEL_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"

BLANK = "\u2581"
"""What SentencePiece writes for a space."""
_ONLY_BLANK = re.compile(f"({BLANK})")
_PROBE = f"a  b\n\t{BLANK} \u4f60\U0001f600"
# What is kept of words seen: so many, of no more characters.
_KNOWN_WORDS = 1 << 16
_LONGEST_WORD = 200


class Tokenizer(abc.ABC):
    """One interface to both libraries.

    `special_ids` maps the text of each special token to its id: they separate turns and documents. `mark_ids` are those
    of what an answer itself may hold, such as `<think>`. With `allow_special` (the default) such a text inside what is
    encoded becomes that one id, as in MiniMind's own data; without it, it is encoded like any other text.
    `is_lossless` says whether every text comes back from its ids.
    """

    is_lossless = True

    def __init__(
        self,
        file: Path,
        vocab_size: int,
        special_ids: dict[str, int],
        mark_ids: dict[str, int],
        eos_token: str | None,
    ) -> None:
        self.file = file
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.mark_ids = mark_ids
        self.eos_token_id = self._find_end(eos_token)
        self.typecode = "H" if vocab_size <= 1 << 16 else "I"

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """The token ids of `text`. Raises `UserError` for text with lone surrogates, which is no valid Unicode."""
        return self.encode_batch([text], allow_special)[0]

    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[list[int]]:
        """The token ids of each text, in order, computed in the calling process."""
        return [array(self.typecode, packed).tolist() for packed in self.encode_packed(texts, allow_special)]

    @abc.abstractmethod
    def encode_packed(self, texts: Sequence[str], allow_special: bool = True) -> list[bytes]:
        """As `encode_batch`, but the ids of each text packed as `array(typecode)` does: for ids that are only written
        away, without an object for each."""

    @abc.abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for (a character may be spread over several tokens)."""

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`, special tokens written out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, map(int, token_ids))).decode("utf-8", errors="replace")

    def _find_end(self, eos_token: str | None) -> int:
        known = [token for token in self.special_ids if _END_TOKENS.fullmatch(token)]
        if eos_token is None and SPECIAL_TOKENS[0] in self.special_ids:
            eos_token = SPECIAL_TOKENS[0]
        elif eos_token is None and len(known) == 1:
            eos_token = known[0]
        if eos_token not in self.special_ids:
            named = (
                f"special token {eos_token}"
                if eos_token is not None
                else f"one special token such as {SPECIAL_TOKENS[0]}"
            )
            choices = ", ".join(known or self.special_ids) or "none at all"
            raise UserError(f"{self.file} has no {named} to end documents: choose with --eos-token among {choices}")
        return self.special_ids[eos_token]

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} of {self.file}")


class SentencePieceTokenizer(Tokenizer):
    """A model of `data_prep.train_tokenizer`: byte fallback and no normalisation."""

    def __init__(self, file: Path, eos_token: str | None = None) -> None:
        data = _read_file(file)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            pieces = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        except (RuntimeError, ValueError, TypeError):
            raise UserError(f"{file} is not a SentencePiece model, or it is damaged") from None
        if tuple(pieces[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise UserError(
                f"{file} does not begin with {', '.join(SPECIAL_TOKENS)}: train one with data_prep.train_tokenizer, or "
                f"use the model's {JSON_NAME}"
            )
        controls = {piece: i for i, piece in enumerate(pieces) if self._model.is_control(i)}
        marks = {piece: controls.pop(piece) for piece in CONTENT_MARKS if piece in controls}
        super().__init__(file, len(pieces), controls, marks, eos_token)
        self._bytes = [self._find_bytes(i, piece) for i, piece in enumerate(pieces)]
        kinds = (self._model.is_byte, self._model.is_control, self._model.is_unknown)
        learnt = [piece for i, piece in enumerate(pieces) if not any(holds(i) for holds in kinds)]
        self._find_parts = words_pattern(learnt).findall
        # What the library cannot be given. It takes the mark for a space: its bytes cannot be mistaken.
        blank_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]
        self._given = {BLANK: array(self.typecode, blank_ids).tobytes()}
        self._given |= {token: array(self.typecode, [i]).tobytes() for token, i in (controls | marks).items()}
        self._given_pattern = re.compile("(" + "|".join(map(re.escape, sorted(self._given, key=len)[::-1])) + ")")
        # The library spends most of its time on words that it has seen before.
        self._encode_word = functools.lru_cache(maxsize=_KNOWN_WORDS)(self._encode_part)
        is_complete = BLANK in pieces and sum(map(self._model.is_byte, range(len(pieces)))) == 256
        if not is_complete or self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(f"{file} does not give back every text exactly: train it with data_prep.train_tokenizer")

    def encode_packed(self, texts: Sequence[str], allow_special: bool = True) -> list[bytes]:
        packed = []
        for text in texts:
            parts = self._cut(_check_text(text), allow_special)
            is_long = max(map(len, parts), default=0) > _LONGEST_WORD
            packed.append(b"".join(map(self._encode_part if is_long else self._encode_word, parts)))
        return packed

    def token_bytes(self, token_id: int) -> bytes:
        self._check_id(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int, piece: str) -> bytes:
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token_id):
            return "\ufffd".encode()
        return piece.encode() if self._model.is_control(token_id) else piece.replace(BLANK, " ").encode()

    def _cut(self, text: str, allow_special: bool) -> list[str | bytes]:
        """The text in order: parts for the library, and packed ids of what it cannot be given."""
        if allow_special:
            pattern = self._given_pattern
        elif BLANK in text:
            pattern = _ONLY_BLANK
        else:
            return self._find_parts(text)
        cut: list[str | bytes] = []
        for index, piece in enumerate(pattern.split(text)):
            cut += self._find_parts(piece) if index % 2 == 0 else [self._given[piece]]
        return cut

    def _encode_part(self, part: str | bytes) -> bytes:
        return part if isinstance(part, bytes) else array(self.typecode, self._model.encode(part)).tobytes()


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, such as MiniMind's own. Its padding, truncation and begin or end tokens are not used."""

    def __init__(self, file: Path, eos_token: str | None = None) -> None:
        data = _read_file(file)
        try:
            fields = json.loads(data)
            added = [(token["content"], token["id"], token["special"]) for token in fields.get("added_tokens", ())]
            for token in fields.get("added_tokens", ()):
                token["special"] = True  # so that all of them can be encoded as text
            self._model = tokenizers.Tokenizer.from_str(json.dumps(fields))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is not a Hugging Face tokenizer, or it is damaged: {first_line(error)}") from None
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        special_ids = {text: token_id for text, token_id, is_special in added if is_special}
        mark_ids = {text: token_id for text, token_id, is_special in added if not is_special}
        super().__init__(file, max(vocabulary.values(), default=-1) + 1, special_ids, mark_ids, eos_token)
        self._added = {token_id: text for text, token_id, _ in added}
        self._pieces = {token_id: piece for piece, token_id in vocabulary.items()}
        self._is_byte_level = isinstance(self._model.decoder, tokenizers.decoders.ByteLevel)
        probe = _PROBE.replace(BLANK, "")  # which Llama's tokenizers take for a space
        self.is_lossless = self.decode(self.encode(probe)) == probe

    def encode_packed(self, texts: Sequence[str], allow_special: bool = True) -> list[bytes]:
        self._model.encode_special_tokens = not allow_special
        # Long texts whole, for about 140 bytes of memory a byte: no cut is right for every tokenizer.json (prefixes,
        # special tokens, merges across it).
        encoded = self._model.encode_batch_fast([_check_text(text) for text in texts], add_special_tokens=False)
        return [array(self.typecode, encoding.ids).tobytes() for encoding in encoded]

    def token_bytes(self, token_id: int) -> bytes:
        self._check_id(token_id)
        if token_id in self._added:
            return self._added[token_id].encode()
        if self._is_byte_level:
            return bytes(_byte_of_letter()[letter] for letter in self._pieces.get(token_id, ""))
        return self._model.decode([token_id], skip_special_tokens=False).encode()

    def decode(self, token_ids: Iterable[int]) -> str:
        if self._is_byte_level:
            return super().decode(token_ids)
        return self._model.decode(list(map(int, token_ids)), skip_special_tokens=False)


def load_tokenizer(path: str | Path, eos_token: str | None = None) -> Tokenizer:
    """The tokenizer in a file (`*.model` or `*.json`) or in a folder that holds `tokenizer.model` or `tokenizer.json`.

    `eos_token` names the special token that ends documents; without it, it is found by its name.

    Raises `UserError` naming the file when it is absent, ambiguous, damaged, of another kind, without such a token, or
    not the one that the `tokenizer_config.json` beside it describes.
    """
    path = Path(path)
    file = _find_file(path) if path.is_dir() else path
    if file.suffix == ".model":
        _check_config(file)
        return SentencePieceTokenizer(file, eos_token)
    if file.suffix == ".json" and file.name != CONFIG_NAME:
        return HuggingFaceTokenizer(file, eos_token)
    raise UserError(
        f"{file} is no tokenizer: give a SentencePiece *.model, a Hugging Face {JSON_NAME}, or their folder"
    )


def _find_file(folder: Path) -> Path:
    found = [folder / name for name in (MODEL_NAME, JSON_NAME) if (folder / name).is_file()]
    if len(found) == 1:
        return found[0]
    problem = "holds both {} and {}: name one of the files" if found else "holds neither {} nor {}"
    raise UserError(f"tokenizer folder {folder} " + problem.format(MODEL_NAME, JSON_NAME))


def _read_file(file: Path) -> bytes:
    try:
        return file.read_bytes()
    except FileNotFoundError:
        raise UserError(f"tokenizer {file} does not exist: make one with python -m data_prep.train_tokenizer") from None
    except OSError as error:
        raise UserError(f"cannot read tokenizer {file}: {error.strerror}") from None


def _check_config(file: Path) -> None:
    """A model cut short may still load; the hash beside it tells."""
    config_file = file.with_name(CONFIG_NAME)
    if file.name != MODEL_NAME or not config_file.is_file():
        return
    config = read_json(config_file, "tokenizer description")
    expected = config.get("sha256") if isinstance(config, dict) else ""
    if expected is not None and hashlib.sha256(_read_file(file)).hexdigest() != expected:
        raise UserError(f"{file} is damaged or was replaced: its sha256 is not the one in {config_file}")


def _check_text(text: str) -> str:
    try:
        # The cheapest complete check; the libraries' own errors name neither the character nor its place.
        if not text.isascii():
            text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"text is not valid Unicode: lone surrogate at character {error.start}") from None
    return text


@functools.lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """The letters in which byte-level BPE (GPT-2) writes bytes: printable Latin-1 stands for itself, the rest for the
    letters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
