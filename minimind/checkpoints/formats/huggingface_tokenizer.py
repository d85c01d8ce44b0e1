"""Export a tokenizer for the Hugging Face tools: `tokenizer.json` with the same ids for every text, and its settings.

A SentencePiece model becomes byte-fallback BPE over plain text: its pieces are written with spaces instead of the
SentencePiece blank, so that the blank itself stays ordinary text.
"""

import json
from pathlib import Path
from typing import Any

import sentencepiece

from minimind.data.tokenizer import BLANK, CONFIG_NAME, JSON_NAME, MODEL_NAME, SPECIAL_TOKENS, load_tokenizer
from minimind.errors import UserError

_END_OF_DOCUMENT, _START, _END = SPECIAL_TOKENS
# The format of minimind.data.chat_template.
_CHAT_TEMPLATE = (
    "{% for message in messages %}"
    f"{{{{ '{_START}' + message['role'] + '\\n' + message['content'] + '{_END}\\n' }}}}"
    "{% endfor %}"
    f"{{% if add_generation_prompt %}}{{{{ '{_START}assistant\\n' }}}}{{% endif %}}"
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
    files = {JSON_NAME: _strip(data) if file.suffix == ".json" else _dump(convert_sentencepiece(data))}
    if file.suffix == ".model":
        files[MODEL_NAME] = data
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": max_length,
        "clean_up_tokenization_spaces": False,
        "pad_token": _END_OF_DOCUMENT,
        "eos_token": _END_OF_DOCUMENT,
    }
    if {_START, _END} <= set(tokenizer.special_ids):
        settings |= {"bos_token": _START, "eos_token": _END, "chat_template": _CHAT_TEMPLATE}
    files[CONFIG_NAME] = _dump(settings)
    return files


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


def convert_sentencepiece(data: bytes) -> dict[str, Any]:
    """The tokenizer.json of a SentencePiece model of this project: BPE, byte fallback, no normalisation.

    A merge is any split of a piece into two pieces; SentencePiece applies the merge whose result comes first in the
    vocabulary, the leftmost among equals.
    """
    model = sentencepiece.SentencePieceProcessor(model_proto=data)
    pieces = [model.id_to_piece(token_id) for token_id in range(model.vocab_size())]
    learnt = {
        piece.replace(BLANK, " "): model.get_score(token_id)
        for token_id, piece in enumerate(pieces)
        if not (model.is_control(token_id) or model.is_unknown(token_id) or model.is_byte(token_id))
    }
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(learnt, key=lambda piece: -learnt[piece])
        for cut in range(1, len(piece))
        if piece[:cut] in learnt and piece[cut:] in learnt
    ]
    vocabulary = {piece.replace(BLANK, " "): token_id for token_id, piece in enumerate(pieces)}
    if len(vocabulary) != len(pieces):
        raise UserError("two pieces of the SentencePiece model differ only in how they write a space")
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            {
                "id": token_id,
                "content": token,
                "single_word": False,
                "lstrip": False,
                "rstrip": False,
                "normalized": False,
                "special": True,
            }
            for token_id, token in enumerate(SPECIAL_TOKENS)
        ],
        "normalizer": None,
        "pre_tokenizer": None,
        "post_processor": None,
        "decoder": {"type": "Sequence", "decoders": [{"type": "ByteFallback"}, {"type": "Fuse"}]},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": pieces[model.unk_id()],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": True,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [list(merge) for merge in merges],
        },
    }
