"""Small shards of pairs, and of judged answers."""

import json
from pathlib import Path

from tokenizers_for_tests import save_byte_level

from data_prep.tokenize_corpus import prepare
from data_prep.tokenize_preferences import TokenizePreferencesFlags
from data_prep.writing.encode_chat import PreferenceOptions


def write_comparisons(folder: Path) -> None:
    """Shards of pairs, and of the same answers one by one."""
    tokenizer = save_byte_level(folder / "byte_level")
    words = [f"{number:03d}" for number in range(120)]
    pairs = [{"prompt": f"say {word}", "chosen": word, "rejected": f"no {word}"} for word in words]
    judged = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    for name, records in (("pairs", pairs), ("judged", judged)):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = {"input": (str(source),), "output": folder / name, "tokenizer": tokenizer, "val_fraction": 0.1}
        prepare(TokenizePreferencesFlags(workers=1, unpaired=name == "judged", **flags), PreferenceOptions)
