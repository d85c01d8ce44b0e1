"""jingyaogong/minimind's own SFTDataset beside our preparation with its tokenizer: the same ids, the same targets.

What differs is explained, and counted. Needs a checkout, named by MINIMIND_CHECKOUT.
"""

import importlib.util
import itertools
import json
import os
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest

from data_prep.tokenize_chat import TokenizeChatFlags
from data_prep.tokenize_corpus import prepare
from data_prep.writing.encode_chat import ChatOptions
from minimind.data.shards import ShardReader

CHECKOUT = os.environ.get("MINIMIND_CHECKOUT", "")
pytestmark = pytest.mark.skipif(not CHECKOUT, reason="MINIMIND_CHECKOUT names no checkout of jingyaogong/minimind")

LENGTH = 1024
TOOLS = [{"type": "function", "function": {"name": "天气", "parameters": {"type": "object"}}}]
CALLS = [{"name": "天气", "arguments": {"city": "北京"}}]
FIELDS = ("role", "content", "reasoning_content", "tools", "tool_calls")


def make_conversations(count: int) -> list[list[dict[str, str]]]:
    draw = random.Random(0)
    words = [
        "hello",
        "你好",
        "- one\n- two",
        "(x)",
        "1 + 1 = 2",
        "机器学习",
        "def f(x):\n    return x",
        "🙂",
        "“引号”。",
    ]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 6)))

    made = []
    for _ in range(count):
        messages: list[dict[str, Any]] = []
        has_tools = draw.random() < 0.3
        if has_tools or draw.random() < 0.4:
            messages.append({"role": "system", "content": text(), "tools": json.dumps(TOOLS) if has_tools else ""})
        for _ in range(draw.randint(1, 3)):
            messages.append({"role": "user", "content": text()})
            if has_tools:
                calls = json.dumps(CALLS * draw.randint(1, 2), ensure_ascii=False)
                messages.append({"role": "assistant", "content": draw.choice(["", text()]), "tool_calls": calls})
                messages.append({"role": "tool", "content": text()})
            messages.append({"role": "assistant", "content": text()})
            if draw.random() < 0.5:
                messages[-1]["reasoning_content"] = text()
        made.append([{field: message.get(field, "") for field in FIELDS} for message in messages])
    return made


def test_the_same_ids_and_targets_but_for_what_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import AutoTokenizer

    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    source = tmp_path / "sft.jsonl"
    records = make_conversations(300)
    source.write_text("".join(json.dumps({"conversations": one}, ensure_ascii=False) + "\n" for one in records))
    spec = importlib.util.spec_from_file_location("lm_dataset", Path(CHECKOUT) / "dataset/lm_dataset.py")
    assert spec is not None and spec.loader is not None
    theirs = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(theirs)
    peer = AutoTokenizer.from_pretrained(Path(CHECKOUT) / "model")
    samples = theirs.SFTDataset(str(source), peer, LENGTH)
    # Neither a system prompt out of the air nor an empty thought taken out, which it does to some.
    monkeypatch.setattr(theirs.random, "random", lambda: 0.2)

    names = {"input": (str(source),), "tokenizer": Path(CHECKOUT) / "model", "output": tmp_path / "out"}
    prepare(TokenizeChatFlags(**names, val_fraction=0.0, workers=1), ChatOptions)
    reader = ShardReader(tmp_path / "out/train")
    bounds = [*reader.document_starts(0, reader.num_tokens).tolist(), reader.num_tokens]
    assert len(bounds) == 301 == len(samples) + 1

    end, line_break = peer.convert_tokens_to_ids("<|im_end|>"), peer("\n")["input_ids"]
    empty_thought, thought = peer("<think>\n\n</think>\n\n")["input_ids"], peer("<think>\n")["input_ids"]
    explained: Counter[str] = Counter()
    for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
        input_ids, labels = (tensor.tolist() for tensor in samples[index])
        ids = reader.read(start, stop - start).tolist()
        length = len(ids) - 1
        assert length <= LENGTH and peer.decode(input_ids[:length]) == peer.decode(ids[:length])
        assert input_ids[:length] == ids[:length]
        assert ids[length] == reader.manifest.eos_token_id and set(input_ids[length:]) <= {peer.pad_token_id}
        explained["end tokens behind a conversation, which separate documents in shards"] += 1
        targets = [label != -100 for label in labels[:length]]
        for place in range(length):
            begins_answer = targets[place] and not targets[place - 1]
            if ids[place] == end and targets[place]:
                assert ids[place + 1 : place + 2] == line_break and targets[place + 1]
                targets[place + 1] = False
                explained["line breaks behind <|im_end|>, where generation has stopped"] += 1
            elif begins_answer and ids[place : place + len(empty_thought)] == empty_thought:
                targets[place : place + len(empty_thought)] = [False] * len(empty_thought)
                explained["empty thoughts, which the prompt of an answer holds already"] += 1
            elif begins_answer and ids[place : place + len(thought)] == thought:
                targets[place : place + len(thought)] = [False] * len(thought)
                explained["openings of a thought (<think> and a line break), which the prompt holds"] += 1
        assert reader.read_targets(start, stop - start).tolist() == [*targets, False], peer.decode(ids)
    for difference, count in explained.items():
        print(f"{count:,} {difference}")
    assert len(explained) == 4
