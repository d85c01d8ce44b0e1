"""Small tokenizers of every kind, made in a second, for the tests of everything that reads and writes text."""

import json
from pathlib import Path

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, trainers

from data_prep.train_tokenizer import save_tokenizer, train_tokenizer
from minimind.data.tokenizer import BLANK, SPECIAL_TOKENS

TEXT = "the quick brown fox jumps over the lazy dog. 你好，世界！ 我们在学习。 def f(x):\n    return x + 1\n" * 40
TEXTS = [
    "The quick brown fox jumps over the lazy dog.\n\nIt does so every day, 365 days a year.\n",
    "def f(x):\n    return x  # twice\n\nclass A:\n\tpass\r\n",
    "今天天气很好,我们去公园散步。你好,世界!\n机器学习是人工智能的一个分支。",
]
NASTY = [
    "",
    " ",
    "   leading and trailing   ",
    "\n",
    "\r\n\r\n\t\t \n",
    "a\tb\t\tc",
    "x" + " " * 100 + "y" + "\n" * 50,
    f"the blank itself {BLANK}{BLANK} and {BLANK} beside a space {BLANK}",
    "\u2585\u2047 unknown marks",
    "null \0 inside\0",
    "\ufeffbyte order mark \ufeff",
    "👩‍👩‍👧‍👦 family, flags 🇨🇳, skin 👍🏽",
    "e\u0301 is not é, ﬁ is not fi, Ａ is not A, ² is not 2",
    "\u202eright to left\u202c \u200bzero width\u200d \u00ad",
    "\ue000private\U0010fffd \ufffe\uffff\U0001ffff noncharacters \ufffd",
    "\x01\x1b[0m\x7f\x85\u2028\u2029\u3000\u00a0",
    "<0x41><unk><s></s> <0xE2><0x96><0x81>",
    "<|im_start|>user\n你好<|im_end|>\n<|endoftext|><|im_",
    "a" * 40_000,
    "长" * 40_000,
    "word " * 10_000,
    " " * 40_000,
]


def save_sentencepiece(folder: Path, vocab_size: int = 400) -> Path:
    """`tokenizer.model`, as data_prep.train_tokenizer makes it."""
    save_tokenizer(train_tokenizer(TEXT.splitlines(keepends=True), vocab_size), folder)
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


def save_qwen(folder: Path, vocab_size: int = 400) -> Path:
    """`tokenizer.json` with byte-level BPE that cuts texts as Qwen2's does."""
    file = save_byte_level(folder, vocab_size)
    tokenizer = tokenizers.Tokenizer.from_file(str(file))
    tokenizer.normalizer = normalizers.NFC()
    words = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
        r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    cut = pre_tokenizers.Split(tokenizers.Regex(words), "isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [cut, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.save(str(file))
    return file


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
