"""Text to token ids and back, for SentencePiece models and Hugging Face `tokenizer.json` files alike.

Decoding gives the encoded text back exactly, whatever valid Unicode it is (a foreign `tokenizer.json` that normalises
its input keeps its own rules). Knows nothing of documents, shards or chat templates.
"""

import abc
import functools
import hashlib
import json
import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import sentencepiece
import tokenizers

from minimind.errors import UserError

SPECIAL_TOKENS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
"""The tokens that every tokenizer of this project has, with ids 0, 1 and 2."""
MODEL_NAME = "tokenizer.model"
JSON_NAME = "tokenizer.json"
CONFIG_NAME = "tokenizer_config.json"

BLANK = "\u2581"
"""What SentencePiece writes for a space."""
_PROBE = f"a  b\n\t{BLANK} \u4f60\U0001f600"
# Longer texts are encoded part by part: the libraries need far more memory than text, and time beyond its length.
_PART_CHARACTERS = 1 << 14
_WORDS_CHARACTERS = 160


class Tokenizer(abc.ABC):
    """One interface to both libraries.

    `special_ids` maps the text of each special token to its id. With `allow_special` (the default) such a text inside
    what is encoded becomes that one id, as in MiniMind's own data; without it, it is encoded like any other text.
    """

    def __init__(self, file: Path, vocab_size: int, special_ids: dict[str, int]) -> None:
        self.file = file
        self.vocab_size = vocab_size
        self.special_ids = special_ids
        self.eos_token_id = special_ids[SPECIAL_TOKENS[0]]

    def encode(self, text: str, allow_special: bool = True) -> list[int]:
        """The token ids of `text`. Raises `UserError` for text with lone surrogates, which is no valid Unicode."""
        return self.encode_batch([text], allow_special)[0]

    @abc.abstractmethod
    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[list[int]]:
        """The token ids of each text, in order, computed in the calling process."""

    @abc.abstractmethod
    def token_bytes(self, token_id: int) -> bytes:
        """The UTF-8 bytes that a token stands for (a character may be spread over several tokens)."""

    def decode(self, token_ids: Iterable[int]) -> str:
        """The text of `token_ids`, special tokens written out; bytes that are no UTF-8 become U+FFFD."""
        return b"".join(map(self.token_bytes, map(int, token_ids))).decode("utf-8", errors="replace")

    def _check_id(self, token_id: int) -> None:
        if not 0 <= token_id < self.vocab_size:
            raise UserError(f"token id {token_id} is outside the vocabulary of {self.vocab_size} of {self.file}")


class SentencePieceTokenizer(Tokenizer):
    """A model of `data_prep.train_tokenizer`: byte fallback and no normalisation."""

    def __init__(self, file: Path) -> None:
        data = _read_file(file)
        try:
            self._model = sentencepiece.SentencePieceProcessor(model_proto=data)
            pieces = [self._model.id_to_piece(i) for i in range(self._model.vocab_size())]
        except (RuntimeError, ValueError, TypeError):
            raise UserError(f"{file} is not a SentencePiece model, or it is damaged") from None
        if tuple(pieces[: len(SPECIAL_TOKENS)]) != SPECIAL_TOKENS:
            raise UserError(f"{file} does not begin with {', '.join(SPECIAL_TOKENS)}: use data_prep.train_tokenizer")
        super().__init__(file, len(pieces), {token: i for i, token in enumerate(SPECIAL_TOKENS)})
        self._bytes = [self._find_bytes(i, piece) for i, piece in enumerate(pieces)]
        self._find_parts = _words_pattern().findall
        self._blank_ids = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in BLANK.encode()]
        is_complete = BLANK in pieces and sum(map(self._model.is_byte, range(len(pieces)))) == 256
        if not is_complete or self.decode(self.encode(_PROBE)) != _PROBE:
            raise UserError(f"{file} does not give back every text exactly: train it with data_prep.train_tokenizer")

    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[list[int]]:
        pieces = [self._cut(_check_text(text), allow_special) for text in texts]
        parts = [piece for of_text in pieces for piece in of_text if isinstance(piece, str)]
        encoded = iter(self._model.encode(parts, num_threads=1))
        encoded_texts = []
        for of_text in pieces:
            ids: list[int] = []
            for piece in of_text:
                ids += next(encoded) if isinstance(piece, str) else piece
            encoded_texts.append(ids)
        return encoded_texts

    def token_bytes(self, token_id: int) -> bytes:
        self._check_id(token_id)
        return self._bytes[token_id]

    def _find_bytes(self, token_id: int, piece: str) -> bytes:
        if self._model.is_byte(token_id):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(token_id):
            return "\ufffd".encode()
        return piece.encode() if self._model.is_control(token_id) else piece.replace(BLANK, " ").encode()

    def _cut(self, text: str, allow_special: bool) -> list[str | list[int]]:
        """The text in order, as parts that the library encodes, and ids for what it cannot be given."""
        # The library takes the mark for a space; its three bytes as byte tokens cannot be mistaken.
        given = {BLANK: self._blank_ids}
        if allow_special and "<|" in text:
            given |= {token: [token_id] for token, token_id in self.special_ids.items()}
        elif BLANK not in text:
            return self._find_parts(text)
        pattern = _SPECIALS_AND_BLANK if len(given) > 1 else _ONLY_BLANK
        cut: list[str | list[int]] = []
        for piece in pattern.split(text):
            cut += [given[piece]] if piece in given else self._find_parts(piece)
        return cut


class HuggingFaceTokenizer(Tokenizer):
    """A `tokenizer.json`, such as MiniMind's own. Its padding, truncation and begin or end tokens are not used."""

    def __init__(self, file: Path) -> None:
        try:
            self._model = tokenizers.Tokenizer.from_str(_read_file(file).decode("utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file} is not a Hugging Face tokenizer, or it is damaged: {_first_line(error)}") from None
        self._model.no_truncation()
        self._model.no_padding()
        vocabulary = self._model.get_vocab(with_added_tokens=True)
        added = self._model.get_added_tokens_decoder()
        special_ids = {token.content: token_id for token_id, token in added.items() if token.special}
        if SPECIAL_TOKENS[0] not in special_ids:
            raise UserError(f"{file} has no special token {SPECIAL_TOKENS[0]}, which ends every document")
        super().__init__(file, max(vocabulary.values()) + 1, special_ids)
        self._added = {token_id: token.content for token_id, token in added.items()}
        self._pieces = {token_id: piece for piece, token_id in vocabulary.items()}
        self._is_byte_level = isinstance(self._model.decoder, tokenizers.decoders.ByteLevel)
        self._find_parts = _part_pattern().findall

    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[list[int]]:
        self._model.encode_special_tokens = not allow_special
        parts = [self._cut(_check_text(text)) for text in texts]
        encoded = iter(self._model.encode_batch_fast([p for ps in parts for p in ps], add_special_tokens=False))
        return [[token_id for _ in ps for token_id in next(encoded).ids] for ps in parts]

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

    def _cut(self, text: str) -> list[str]:
        return [text] if len(text) <= _PART_CHARACTERS else self._find_parts(text)


def load_tokenizer(path: str | Path) -> Tokenizer:
    """The tokenizer in a file (`*.model` or `*.json`) or in a folder that holds `tokenizer.model` or `tokenizer.json`.

    Raises `UserError` naming the file when it is absent, ambiguous, damaged, of another kind, or not the one that the
    `tokenizer_config.json` beside it describes.
    """
    path = Path(path)
    file = _find_file(path) if path.is_dir() else path
    if file.suffix == ".model":
        _check_config(file)
        return SentencePieceTokenizer(file)
    if file.suffix == ".json" and file.name != CONFIG_NAME:
        return HuggingFaceTokenizer(file)
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
    try:
        config = json.loads(_read_file(config_file))
        expected = config.get("sha256")
    except (ValueError, AttributeError):
        raise UserError(f"{config_file} is damaged: it is not a JSON object") from None
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


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


_ONLY_BLANK = re.compile(f"({BLANK})")
_SPECIALS_AND_BLANK = re.compile("(" + "|".join(map(re.escape, (*SPECIAL_TOKENS, BLANK))) + ")")


def _words_pattern() -> re.Pattern[str]:
    """Parts for SentencePiece, of some words each. Its pieces are learnt inside words: none goes on across the start of
    a run of spaces, so parts that begin there encode to the same ids as the whole text does, and faster when short.
    Text without spaces is cut where it is too long for memory."""
    end = r"(?<=[^ ])(?= |\Z)"
    return re.compile(rf"(?s).{{1,{_WORDS_CHARACTERS}}}{end}|.{{1,{_PART_CHARACTERS}}}?{end}|.{{1,{_PART_CHARACTERS}}}")


def _part_pattern() -> re.Pattern[str]:
    """Parts that end before a single space between two words, where every byte-level tokenizer begins a new token
    anyway; else before white space; else anywhere. Nothing is lost in any case."""
    part = f".{{1,{_PART_CHARACTERS}}}"
    return re.compile(rf"(?s){part}(?<=\S)(?= \S|\Z)|{part}(?=\s|\Z)|{part}")


@functools.lru_cache(maxsize=1)
def _byte_of_letter() -> dict[str, int]:
    """The letters in which byte-level BPE (GPT-2) writes bytes: printable Latin-1 stands for itself, the rest for the
    letters from U+0100 on, in order."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(0x100 + i): byte for i, byte in enumerate(others)}
