"""Small shards of pairs, of judged answers, and of questions; a reward that an untrained model earns too."""

import json
from pathlib import Path

from tokenizers_for_tests import save_byte_level

from data_prep.tokenize_chat import TokenizeChatFlags
from data_prep.tokenize_corpus import prepare
from data_prep.tokenize_preferences import TokenizePreferencesFlags
from data_prep.writing.encode_chat import ChatOptions, PreferenceOptions
from minimind.training.rewards.ready import Answer


def write_comparisons(folder: Path) -> None:
    """Shards of pairs, of the same answers one by one, and of the questions with the preferred answers."""
    tokenizer = save_byte_level(folder / "byte_level")
    words = [f"{number:03d}" for number in range(120)]
    pairs = [{"prompt": f"say {word}", "chosen": word, "rejected": f"no {word}"} for word in words]
    judged = [
        {"prompt": pair["prompt"], "completion": pair[side], "label": side == "chosen"}
        for pair in pairs
        for side in ("chosen", "rejected")
    ]
    asked = [{"instruction": pair["prompt"], "output": pair["chosen"]} for pair in pairs]
    for name, records in (("pairs", pairs), ("judged", judged), ("asked", asked)):
        source = folder / f"{name}.jsonl"
        source.write_text("".join(json.dumps(record) + "\n" for record in records))
        flags = {"input": (str(source),), "output": folder / name, "tokenizer": tokenizer, "val_fraction": 0.1}
        if name == "asked":
            prepare(TokenizeChatFlags(workers=1, **flags), ChatOptions)
        else:
            prepare(TokenizePreferencesFlags(workers=1, unpaired=name == "judged", **flags), PreferenceOptions)


def count_letters(answer: Answer) -> int:
    """A reward."""
    return sum(map(str.isalpha, answer.text))
