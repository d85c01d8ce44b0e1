"""Export a tokenizer for the Hugging Face tools: `tokenizer.json` with the same ids for every text, and its settings.

A SentencePiece model becomes byte-fallback BPE over plain text: its pieces are written with spaces instead of the
SentencePiece blank, so that the blank itself stays ordinary text.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece
import tokenizers
from tokenizers import AddedToken, decoders
from tokenizers.models import BPE

from minimind.data.chat_template import find_chat_template
from minimind.data.tokenizer import (
    BLANK,
    CONFIG_NAME,
    CONTENT_MARKS,
    JSON_NAME,
    MODEL_NAME,
    SPECIAL_TOKENS,
    load_tokenizer,
)
from minimind.errors import UserError

_END_OF_DOCUMENT, _START, _END = SPECIAL_TOKENS
# How Qwen's tokenizers cut a text before they look for pieces.
_QWEN_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def tokenizer_files(file: Path, max_length: int) -> dict[str, bytes]:
    """Name and content of each file that `AutoTokenizer` needs, and for llama.cpp the SentencePiece model itself.

    Args:
        max_length: tokens that the model can read.

    Raises:
        UserError: the tokenizer is damaged or of an unsupported kind.
    """
    tokenizer = load_tokenizer(file)
    data = file.read_bytes()
    is_json = file.suffix == ".json"
    files = {JSON_NAME: _strip(data)} if is_json else {JSON_NAME: convert_sentencepiece(data), MODEL_NAME: data}
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        # For llama.cpp's converter, which would otherwise begin every text with a mark and a blank.
        "add_bos_token": False,
        "add_prefix_space": False,
        "pad_token": _END_OF_DOCUMENT,
        "eos_token": _END_OF_DOCUMENT,
    }
    if {_START, _END} <= set(tokenizer.special_ids):
        settings |= {"bos_token": _START, "eos_token": _END}
    if (template := find_chat_template(tokenizer)) is not None:
        settings |= {**template.named_tokens, "chat_template": template.text}
    return files | {CONFIG_NAME: _dump(settings)}


def cuts_as_qwen(file: Path) -> bool:
    """Whether a tokenizer cuts and normalises texts as Qwen2's does. transformers 5 does so in a folder whose
    `model_type` is qwen2 whatever its tokenizer.json says."""
    if file.suffix != ".json":
        return False
    content = json.loads(file.read_bytes())
    cutter = content.get("pre_tokenizer") or {}
    patterns = [step.get("pattern", {}).get("Regex") for step in cutter.get("pretokenizers", [cutter])]
    return content.get("normalizer") == {"type": "NFC"} and _QWEN_WORDS in patterns


def _strip(data: bytes) -> bytes:
    """A tokenizer.json without what our own reader ignores: truncation, padding, begin and end tokens."""
    content = json.loads(data)
    unwanted = [key for key in ("truncation", "padding") if content.get(key) is not None]
    processor = content.get("post_processor")
    if processor is not None and processor.get("type") != "ByteLevel":
        unwanted.append("post_processor")
    return _dump({**content, **dict.fromkeys(unwanted)}) if unwanted else data


def _dump(content: dict[str, Any]) -> bytes:
    return (json.dumps(content, ensure_ascii=False, indent=1) + "\n").encode()


def convert_sentencepiece(data: bytes) -> bytes:
    """The tokenizer.json of a SentencePiece model of this project: BPE, byte fallback, no normalisation.

    A merge is any split of a piece into two pieces; SentencePiece applies the merge whose result comes first in the
    vocabulary, the leftmost among equals.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [model.id_to_piece(token_id).replace(BLANK, " ") for token_id in range(model.vocab_size())]
    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise UserError("two pieces of the SentencePiece model differ only in how they write a space")
    learnt = {
        piece: model.get_score(token_id)
        for piece, token_id in vocabulary.items()
        if not (model.is_control(token_id) or model.is_unknown(token_id) or model.is_byte(token_id))
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(learnt, key=lambda piece: -learnt[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in learnt and piece[cut:] in learnt
    ]
    unknown = pieces[model.unk_id()]
    tokenizer = tokenizers.Tokenizer(BPE(vocabulary, merges, unk_token=unknown, byte_fallback=True))
    control = [piece for token_id, piece in enumerate(pieces) if model.is_control(token_id)]
    tokenizer.add_special_tokens(
        [AddedToken(piece, normalized=False) for piece in control if piece not in CONTENT_MARKS]
    )
    # Not special: what is decoded without special tokens keeps a tool's call.
    tokenizer.add_tokens([AddedToken(piece, normalized=False) for piece in control if piece in CONTENT_MARKS])
    replaced = decoders.Replace(unknown, "\ufffd")
    tokenizer.decoder = decoders.Sequence([replaced, decoders.ByteFallback(), decoders.Fuse()])
    return tokenizer.to_str(pretty=True).encode()
