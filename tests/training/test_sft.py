"""Fine-tuning on conversations: the loss of an independent rule, whatever the ranks, the stage and a stop."""

import json
import multiprocessing
import shutil
import signal
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from tokenizers_for_tests import save_byte_level
from training_runs import (
    PRELOAD,
    RankPool,
    flags_for,
    losses,
    rank_pool,
    read_metrics,
    train,
    train_rank,
    weights,
)

from data_prep.tokenize_chat import TokenizeChatFlags
from data_prep.tokenize_corpus import prepare
from data_prep.writing.encode_chat import ChatOptions
from minimind.checkpoints.folder import list_checkpoints
from minimind.checkpoints.formats.load_model import load_model
from minimind.data.chat_template import TEMPLATE_NAME, load_chat_template
from minimind.data.dataset import load_shards
from minimind.data.tokenizer import load_tokenizer
from minimind.distributed.launchers.local import find_free_port
from minimind.errors import UserError
from minimind.evaluate import main as evaluate_main

TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def make_conversations(count: int) -> list[list[dict[str, str]]]:
    turns = [("say fox", "the quick fox"), ("你好", "你好，世界！"), ("def", "def f(x):\n    return x + 1")]
    picked = [[turns[(i + j) % 3] for j in range(i % 2 + 1)] for i in range(count)]
    roles = ("user", "assistant")
    return [[{"role": r, "content": c} for turn in one for r, c in zip(roles, turn, strict=True)] for one in picked]


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Conversations with a template of the tokenizer's own."""
    folder = tmp_path_factory.mktemp("sft")
    tokenizer = save_byte_level(folder / "tokenizer")
    (tokenizer.parent / TEMPLATE_NAME).write_text(TEMPLATE)
    source = folder / "chat.jsonl"
    records = make_conversations(64)
    source.write_text("".join(json.dumps({"messages": r, "id": i}) + "\n" for i, r in enumerate(records)))
    names = {"input": (str(source),), "tokenizer": tokenizer, "output": folder / "shards", "val_fraction": 0.0}
    prepare(TokenizeChatFlags(**names, val_input=(), workers=1), ChatOptions)
    return folder / "shards"


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    yield from rank_pool(2)


def flags(shards: Path, run_dir: Path, **others: object) -> list[str]:
    settings = {"vocab_size": 400, "seq_len": 64, "max_position_embeddings": 64, "steps": 4, **others}
    return flags_for(shards, run_dir, **settings)


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    train(flags(shards, run_dir))
    return run_dir


def test_the_loss_is_that_of_an_independent_rule(shards: Path, tmp_path: Path) -> None:
    """One step over all windows: every conversation by itself, its answers found in the text."""
    windows = len(load_shards(shards, seq_len=64))
    train(flags(shards, tmp_path / "run", steps=1, warmup_steps=0, global_batch_size=windows, lr=1e-9))
    model, tokenizer_file = load_model(tmp_path / "run")
    tokenizer = load_tokenizer(tokenizer_file)
    template = load_chat_template(tokenizer)
    assert template.text == TEMPLATE, "the run lost the template"
    total = count = 0.0
    for messages in make_conversations(64):
        ids: list[int] = []
        labels: list[int] = []
        for message in messages:
            opening = [1, *tokenizer.encode(f"{message['role']}\n", allow_special=False)]
            content = tokenizer.encode(message["content"], allow_special=False)
            is_answer = message["role"] == "assistant"
            if not is_answer:
                opening, content = [1, *tokenizer.encode(f"user\n{message['content']}", allow_special=False)], []
            ids += [*opening, *content, 2]
            labels += [-100] * len(opening) + ([*content, 2] if is_answer else [-100] * (len(content) + 1))
            ids += tokenizer.encode("\n", allow_special=False)
            labels += [-100]
        with torch.no_grad():
            logits = model(torch.tensor([ids])).logits[0, :-1]
        total += F.cross_entropy(logits, torch.tensor(labels[1:]), reduction="sum").item()
        count += sum(label != -100 for label in labels[1:])
    assert losses(tmp_path / "run")[1] == approx(total / count, rel=1e-5)


@pytest.mark.parametrize(("stage", "sp_size"), [(0, 1), (1, 1), (2, 1), (3, 1), (2, 2)])
def test_two_ranks_of_any_stage_give_the_same_losses(
    pool: RankPool, plain: Path, shards: Path, tmp_path: Path, stage: int, sp_size: int
) -> None:
    pool.run(train, flags(shards, tmp_path, stage=stage, sp_size=sp_size))
    assert list(losses(tmp_path).values()) == approx(list(losses(plain).values()), rel=1e-5)


def test_steps_over_the_same_conversations_have_the_same_losses_packed_or_not(
    shards: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each step takes all of them, in full windows or each in a window of its own."""
    long = {"seq_len": 128, "max_position_embeddings": 128, "steps": 3}
    windows = len(load_shards(shards, seq_len=128))
    assert windows < 32
    train(flags(shards, tmp_path / "packed", global_batch_size=windows, **long))
    monkeypatch.setattr(
        "minimind.data.dataset.pack", lambda lengths, _: (np.arange(len(lengths)), np.arange(len(lengths) + 1))
    )
    train(flags(shards, tmp_path / "apart", global_batch_size=64, micro_batch_size=16, **long))
    assert list(losses(tmp_path / "apart").values()) == approx(list(losses(tmp_path / "packed").values()), rel=1e-5)


def test_a_run_that_is_killed_goes_on_as_if_it_had_not_been(plain: Path, shards: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOAD)
    line = flags(shards, tmp_path / "run")
    process = context.Process(target=train_rank, args=(line, 0, 1, find_free_port(), tmp_path / "log"))
    process.start()
    metrics = tmp_path / "run/metrics.jsonl"
    while not (metrics.exists() and metrics.read_text().count("\n") > 2):
        assert process.is_alive(), (tmp_path / "log").read_text()
        time.sleep(0.002)
    process.kill()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    train(line)
    assert losses(tmp_path / "run") == losses(plain)


def test_a_resumed_run_is_the_uninterrupted_one(plain: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    assert max(losses(plain)) == 4
    train(flags(shards, tmp_path / "run"))
    assert losses(tmp_path / "run") == losses(plain)
    there, here = weights(plain), weights(tmp_path / "run")
    assert all(torch.equal(here[name], there[name]) for name in there)


def test_conversations_have_no_bits_per_byte(plain: Path, shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    evaluate_main(["--checkpoint", str(plain), "--shards", str(shards), "--split", "train", "--seq-len", "64"])
    assert "bits per byte   -\n" in capsys.readouterr().out
    assert json.loads((plain / "evaluation.json").read_text())["bits_per_byte"] is None


def test_fine_tuning_begins_with_the_weights_of_a_run(plain: Path, shards: Path, tmp_path: Path) -> None:
    train([*flags(shards, tmp_path, lr=1e-9), "--init-from", str(plain)])
    assert losses(tmp_path)[1] < losses(plain)[1]


def test_what_a_run_changes_of_the_model_it_begins_with_is_said(plain: Path, shards: Path, tmp_path: Path) -> None:
    longer = ["--rope-theta", "5e4", "--rope-scaling-factor", "4", "--max-position-embeddings", "4096", "--dry-run"]
    _, printed = train([*flags(shards, tmp_path), "--init-from", str(plain), *longer])
    changes = "max_position_embeddings 64 -> 4096, rope_theta 1000000.0 -> 50000.0, rope_scaling_factor 1.0 -> 4.0"
    assert f"note      the model of init_from is changed: {changes}" in printed
    _, printed = train([*flags(shards, tmp_path), "--init-from", str(plain), "--dry-run"])
    assert "is changed" not in printed


def test_new_tokens_start_at_the_mean(plain: Path, shards: Path, tmp_path: Path) -> None:
    line = flags(shards, tmp_path, stage=3, lr=1e-9, steps=1, warmup_steps=0, vocab_size=402)
    _, printed = train([*line, "--init-from", str(plain)])
    assert "new tokens: 2, which start at the mean of the others" in printed
    there, here = weights(plain), weights(tmp_path)
    name = "model.embed_tokens.weight"
    mean = there[name].mean(0, keepdim=True).expand(2, -1)
    torch.testing.assert_close(here[name], torch.cat([there[name], mean]), atol=1e-6, rtol=0)
    with pytest.raises(UserError, match=r"model.embed_tokens.weight \(400, 16\), the model of this run \(402, 32\)"):
        train([*flags(shards, tmp_path / "wide", vocab_size=402, hidden_size=32), "--init-from", str(plain)])


def test_another_packing_is_another_run(plain: Path, tiny_corpus: Path, shards: Path, tmp_path: Path) -> None:
    train(flags(tiny_corpus, tmp_path, steps=2, packing="whole-documents", vocab_size=256))
    with pytest.raises(UserError, match="packing"):
        train(flags(tiny_corpus, tmp_path, steps=4, vocab_size=256))


def test_the_run_is_recorded_as_packed(plain: Path) -> None:
    data = json.loads((plain / "run_config.json").read_text())["data"]
    assert (data["packing"], data["document_mask"]) == ("whole-documents", True)
    assert all("eval_bits_per_byte" not in record for record in read_metrics(plain))
