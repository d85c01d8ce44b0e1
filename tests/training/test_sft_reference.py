"""Fine-tuning against transformers: ids and targets found by another rule, the loss, the gradient of every weight."""

import json
import random
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from tokenizers_for_tests import save_sentencepiece

from data_prep.tokenize_chat import TokenizeChatFlags
from data_prep.tokenize_corpus import prepare
from data_prep.writing.encode_chat import ChatOptions
from minimind.data.dataset import load_shards
from minimind.data.loader import collate
from minimind.data.shards import ShardReader
from minimind.export import main as export
from minimind.model import MiniMindForCausalLM, ModelConfig

CONFIG = ModelConfig(
    vocab_size=400, hidden_size=32, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=1,
    max_position_embeddings=512,
)  # fmt: skip
Conversation = list[dict[str, str]]


def make_conversations(count: int) -> list[Conversation]:
    draw = random.Random(0)
    words = ["the fox", "你好，世界", "- one\n- two", "(x)", "`a`\n\n", "\n.", "def f(x):\n    return x", "365 days."]

    def text() -> str:
        return " ".join(draw.choices(words, k=draw.randint(1, 4)))

    made = []
    for _ in range(count):
        messages = [{"role": "system", "content": text()}] if draw.random() < 0.3 else []
        for _ in range(draw.randint(1, 3)):
            messages += [{"role": "user", "content": text()}, {"role": "assistant", "content": text()}]
        made.append(messages)
    return made


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model with its export, and shards of 200 conversations."""
    folder = tmp_path_factory.mktemp("reference")
    torch.manual_seed(0)
    model = MiniMindForCausalLM(CONFIG)
    model.save_pretrained(folder / "own")
    tokenizer = save_sentencepiece(folder / "own")
    export(["--checkpoint", str(folder / "own"), "--output", str(folder / "export")])
    source = folder / "chat.jsonl"
    source.write_text("".join(json.dumps({"messages": one}) + "\n" for one in make_conversations(200)))
    names = {"input": (str(source),), "tokenizer": tokenizer, "output": folder / "shards", "val_fraction": 0.0}
    prepare(TokenizeChatFlags(**names, workers=1), ChatOptions)
    return folder


@pytest.fixture(scope="module")
def labelled(folder: Path) -> list[tuple[list[int], list[int]]]:
    """Ids and labels of each conversation: transformers encodes the whole text, and a label begins behind the line of
    the role and ends with the mark that closes the turn."""
    from transformers import AutoTokenizer

    peer = AutoTokenizer.from_pretrained(folder / "export")
    opening, end = peer("<|im_start|>assistant\n")["input_ids"], peer("<|im_end|>")["input_ids"]
    found = []
    for messages in make_conversations(200):
        ids = peer(peer.apply_chat_template(messages, tokenize=False))["input_ids"]
        labels, inside = [-100] * len(ids), False
        for place, token in enumerate(ids):
            labels[place] = token if inside else -100
            inside = (inside and [token] != end) or ids[: place + 1][-len(opening) :] == opening
        found.append((ids, labels))
    return found


def test_the_ids_and_targets_of_200_conversations(folder: Path, labelled: list[tuple[list[int], list[int]]]) -> None:
    reader = ShardReader(folder / "shards/train")
    bounds = [*reader.document_starts(0, reader.num_tokens), reader.num_tokens]
    assert len(bounds) == 201
    for (ids, labels), start, end in zip(labelled, bounds[:-1], bounds[1:], strict=True):
        assert reader.read(start, end - start).tolist() == [*ids, reader.manifest.eos_token_id]
        assert reader.read_targets(start, end - start).tolist() == [label != -100 for label in [*labels, -100]]


def test_the_loss_and_the_gradients(folder: Path, labelled: list[tuple[list[int], list[int]]]) -> None:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(folder / "export", dtype=torch.float32)
    # Shorter ones are filled up behind their end, which causality hides from them.
    rows = [[torch.tensor(row) for row in rows] for rows in zip(*labelled, strict=True)]
    ids = torch.nn.utils.rnn.pad_sequence(rows[0], batch_first=True)
    labels = torch.nn.utils.rnn.pad_sequence(rows[1], batch_first=True, padding_value=-100)
    expected = F.cross_entropy(theirs(ids).logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
    expected.backward()

    ours = MiniMindForCausalLM.from_pretrained(folder / "own").train()
    windows = load_shards(folder / "shards", seq_len=192)
    batch = collate([windows[index] for index in range(len(windows))], range(len(windows)))
    assert batch.num_targets == int((labels[:, 1:] != -100).sum()) and len(windows) < 120
    loss = ours(
        batch.input_ids, batch.labels, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens,
        loss_reduction="sum",
    ).loss / batch.num_targets  # fmt: skip
    loss.backward()
    torch.testing.assert_close(loss, expected, rtol=1e-5, atol=0)
    gradients = {name: parameter.grad for name, parameter in theirs.named_parameters()}
    assert gradients.keys() == {name for name, _ in ours.named_parameters()}
    for name, parameter in ours.named_parameters():
        there = gradients[name]
        assert parameter.grad is not None and there is not None and there.abs().max() > 0
        torch.testing.assert_close(parameter.grad, there, rtol=0, atol=1e-5 * float(there.abs().max()))
