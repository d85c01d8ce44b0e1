"""Small tokenizers of every kind, made in a second, for the tests of everything that reads and writes text."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, pre_tokenizers, trainers

from data_prep.train_tokenizer import save_tokenizer, train_tokenizer
from minimind.data.tokenizer import SPECIAL_TOKENS

TEXT = "the quick brown fox jumps over the lazy dog. 你好，世界！ 我们在学习。 def f(x):\n    return x + 1\n" * 40


def save_sentencepiece(folder: Path, vocab_size: int = 400) -> Path:
    """`tokenizer.model`, as data_prep.train_tokenizer makes it."""
    save_tokenizer(train_tokenizer(TEXT.splitlines(keepends=True), vocab_size), folder, vocab_size)
    return folder / "tokenizer.model"


def save_byte_level(folder: Path, vocab_size: int = 400) -> Path:
    """`tokenizer.json` with byte-level BPE, as MiniMind's own is."""
    tokenizer = tokenizers.Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([TEXT], trainer)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def save_metaspace(folder: Path, vocab_size: int = 400) -> Path:
    """`tokenizer.json` with a mark for spaces and byte fallback, as Llama's is: decoding drops a leading space."""
    tokenizer = tokenizers.Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = [*SPECIAL_TOKENS, "<unk>"]
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator([TEXT.encode("ascii", "ignore").decode()], trainer)
    fields, bytes_at = json.loads(tokenizer.to_str()), tokenizer.get_vocab_size()
    fields["model"]["vocab"] |= {f"<0x{byte:02X}>": bytes_at + byte for byte in range(256)}
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "tokenizer.json").write_text(json.dumps(fields), encoding="utf-8")
    return folder / "tokenizer.json"


KINDS = {"sentencepiece": save_sentencepiece, "byte-level": save_byte_level, "metaspace": save_metaspace}
