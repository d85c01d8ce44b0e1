"""Small corpora for every test that trains: a stream with structure, so that a loss can fall."""

from pathlib import Path

import numpy as np

from minimind.data.shard_writer import ShardWriter

VOCAB_SIZE = 256


def write_corpus(
    folder: Path,
    *,
    tokens: int,
    val_tokens: int = 0,
    vocab_size: int = VOCAB_SIZE,
    seed: int = 0,
    chat_template: str | None = None,
) -> Path:
    """A corpus folder whose documents follow x -> (5x + noise) mod vocab_size, of 20 to 200 tokens each.

    Args:
        chat_template: the documents are conversations, and every other token is a target.
    """
    rng = np.random.default_rng(seed)
    tokenizer = folder.with_name(folder.name + "-tokenizer.json")
    tokenizer.parent.mkdir(parents=True, exist_ok=True)
    tokenizer.write_text("{}")
    for split, wanted in (("train", tokens), ("val", val_tokens)):
        if not wanted:
            continue
        writer = ShardWriter(
            folder / split,
            vocab_size=vocab_size,
            eos_token_id=0,
            tokenizer_file=tokenizer,
            shard_tokens=4000,
            chat_template=chat_template,
        )
        written = 0
        while written < wanted:
            length = int(rng.integers(20, 200))
            document = np.empty(length, dtype=np.int64)
            document[0] = rng.integers(3, vocab_size)
            for i in range(1, length):
                document[i] = 3 + (5 * document[i - 1] + rng.integers(0, 3)) % (vocab_size - 3)
            targets = None if chat_template is None else (document % 2).astype(np.uint8)
            writer.add_document(document, 3 * length, targets)
            written += length + 1
        writer.close()
    return folder
