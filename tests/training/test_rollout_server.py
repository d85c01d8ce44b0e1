"""Rollouts by the real `minimind.serve`: it has the weights in training, and nothing is lost when it dies."""

import contextlib
import http.server
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from pytest import approx
from repository import ROOT
from tokenizers_for_tests import save_byte_level
from training_runs import MODEL, RankPool, flags_for, losses, rank_pool, read_metrics, train

from data_prep.tokenize_chat import TokenizeChatFlags
from data_prep.tokenize_corpus import prepare
from data_prep.writing.encode_chat import ChatOptions
from minimind.checkpoints.folder import list_checkpoints
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.inference.generation import end_tokens
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.serve import main as serve
from minimind.training.rewards.rollout import Question, Rollout
from minimind.training.rewards.server import KEY_VARIABLE, WEIGHTS_NAME, RolloutServer

pytest.importorskip("minimind.inference.http_api")

VOCAB, KEY = 400, "a secret"
# Ends the server that PID names, if any; the reward is of the answer alone.
REWARDS = """
import contextlib, os, signal
def kills(answer):
    if "PID" in os.environ:
        with contextlib.suppress(ProcessLookupError): os.kill(int(os.environ["PID"]), signal.SIGKILL)
    return len(set(answer.text))
"""


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("questions")
    source, tokenizer = folder / "questions.jsonl", save_byte_level(folder / "tokenizer")
    sums = [[("user", f"{a}+{b}"), ("assistant", str(a + b))] for a in range(9) for b in range(4)]
    records = [{"messages": [{"role": role, "content": text} for role, text in turns]} for turns in sums]
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {"input": (str(source),), "tokenizer": tokenizer, "output": folder / "shards", "val_fraction": 0.1}
    prepare(TokenizeChatFlags(**names, val_input=(), workers=1), ChatOptions)
    return folder / "shards"


@pytest.fixture(scope="module")
def other_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the server begins with: random weights that no run has."""
    folder = tmp_path_factory.mktemp("served") / "other"
    save_byte_level(folder)
    sizes = {**MODEL, "vocab_size": VOCAB, "hidden_size": 32, "initializer_range": 0.3}
    MiniMindForCausalLM(ModelConfig(**sizes)).save_pretrained(folder)
    return folder


@contextlib.contextmanager
def serving(model: Path) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    command = [sys.executable, "-m", "minimind.serve", "--checkpoint", str(model), "--port", "0", "--device", "cpu"]
    command.append("--accept-weights")
    environment = {**os.environ, KEY_VARIABLE: KEY}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        match = re.search(r"http://\S+:\d+", process.stdout.readline())
        assert match
        yield match[0], process
    finally:
        process.kill()
        process.communicate()


@pytest.fixture(autouse=True)
def settings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "server_rewards.py").write_text(REWARDS)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setenv(KEY_VARIABLE, KEY)


@pytest.fixture(scope="module")
def url(other_model: Path) -> Iterator[str]:
    with serving(other_model) as (url, _):
        yield url


def flags(shards: Path, run_dir: Path, url: str, **others: Any) -> list[str]:
    own = {"objective": "grpo", "reward": "server_rewards:kills", "group_size": 4, "max_new_tokens": 5, "steps": 4}
    own |= {"rollout_server": url, "rollout_steps": 2, "vocab_size": VOCAB, "hidden_size": 32, "seq_len": 64}
    return flags_for(shards, run_dir, **{**own, "lr": 1e-2, "reward_workers": 1, **others})


def test_the_server_has_the_weights_of_each_rollout_and_may_die(
    shards: Path, other_model: Path, url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    with serving(other_model) as (dying, process):
        train(flags(shards, whole, f"{dying}/v1/", eval_every=4, save_every=0))
        steps = {record["step"]: record for record in read_metrics(whole) if "loss" in record}
        for begins, goes_on in ((1, 2), (3, 4)):
            assert steps[begins]["ratio"] == approx(1, abs=1e-3)
            assert steps[begins]["log_prob_gap"] < 1e-4 < steps[goes_on]["log_prob_gap"]
        assert any(record["reward_std"] > 0 for record in steps.values())
        assert "eval_reward" in read_metrics(whole)[-1]
        assert [folder.name for folder in (whole / WEIGHTS_NAME).iterdir()] == ["step_00000004"]

        monkeypatch.setenv("PID", str(process.pid))
        with pytest.raises(UserError, match=r"after step 2: rollout_server http://.*run the same command") as error:
            train(flags(shards, cut, dying, eval_every=4, save_every=0))
        assert "\n" not in str(error.value)
    assert [folder.name for folder in list_checkpoints(cut)] == ["step_00000002"]
    monkeypatch.delenv("PID")
    train(flags(shards, cut, url, eval_every=4, save_every=0))
    assert losses(cut) == approx(losses(whole), abs=1e-4)


def train_with_key(flags: list[str], *rest: Any) -> Any:
    """On a rank that was started without it."""
    os.environ[KEY_VARIABLE] = KEY
    return train(flags, *rest)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    yield from rank_pool(2)


def test_adapters_on_two_ranks_are_merged_into_the_weights(
    pool: RankPool, shards: Path, url: str, tmp_path: Path
) -> None:
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "seq_len": 64}
    train(flags_for(shards, tmp_path / "start", **sizes, steps=2, save_every=0))
    given = {"init_from": tmp_path / "start", "lora_rank": 2, "stage": 3, "lr": 0.1, "steps": 2, "rollout_steps": 1}
    pool.run(train_with_key, flags(shards, tmp_path / "run", url, **given, reward="length"))
    steps = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert all(record["log_prob_gap"] < 1e-4 for record in steps) and len(steps) == 2


def make_client(tokenizer: Any, url: str, seconds: float = 60) -> RolloutServer:
    train = SimpleNamespace(rollout_server=url, rollout_seconds=seconds, rollout_batch_size=2)
    return RolloutServer(SimpleNamespace(train=train, model=ModelConfig(vocab_size=VOCAB)), tokenizer)  # type: ignore[arg-type]


def test_weights_are_taken_from_who_has_the_key_and_only_if_they_fit(
    url: str, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_byte_level(tmp_path / "wide")
    MiniMindForCausalLM(ModelConfig(**{**MODEL, "vocab_size": VOCAB + 8})).save_pretrained(tmp_path / "wide")
    client = make_client(load_tokenizer(other_model), url)

    def give(folder: Path) -> None:
        client._post("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})

    with pytest.raises(UserError, match=r"400 .*the new weights are of 408 tokens, this server's model has 400"):
        give(tmp_path / "wide")
    give(other_model)
    monkeypatch.delenv(KEY_VARIABLE)
    with pytest.raises(UserError, match=r"401 .*the API key is missing"):
        give(other_model)
    with pytest.raises(UserError, match="accept_weights needs a key: give --api-key-file, or set MINIMIND_API_KEY"):
        serve(["--checkpoint", str(other_model), "--accept-weights"])


def test_a_server_with_other_weights_is_found_out(
    shards: Path, url: str, other_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    post = RolloutServer._post

    def keep_weights(client: RolloutServer, path: str, body: dict[str, Any]) -> Any:
        if path == "/collective_rpc":
            body = {"method": "reload_weights", "kwargs": {"weights_path": str(other_model)}}
        return post(client, path, body)

    monkeypatch.setattr(RolloutServer, "_post", keep_weights)
    with pytest.raises(UserError, match=r"after step 0: .* nats from those by the weights given to it; see to it"):
        train(flags(shards, tmp_path, url))


class FakeServer(http.server.BaseHTTPRequestHandler):
    status, said = 200, b""
    is_done = threading.Event()

    def do_POST(self) -> None:
        if self.said == b"hang":
            self.is_done.wait(60)
            return
        self.rfile.read(int(self.headers["Content-Length"]))
        self.send_response(self.status)
        self.end_headers()
        self.wfile.write(self.said)

    def log_message(self, *_: Any) -> None:
        pass


def reply(ids: Any, *log_probs: Any) -> bytes:
    return json.dumps({"choices": [{"token_ids": ids, "logprobs": {"token_logprobs": log_probs}}]}).encode()


def test_what_cannot_be_trained_on_is_one_line(other_model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = load_tokenizer(other_model)
    end = end_tokens(tokenizer)[0]
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), FakeServer) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{server.server_port}"
        row = Rollout(Question([5], [6], 0), tokenizer, 3, temperature=1.0)
        monkeypatch.setattr(FakeServer, "said", reply([7, end], -1.5, -0.5))
        make_client(tokenizer, url)._complete([row])
        assert row.token_ids == [5, 7, end] and row.reason == "stop"
        for status, said, message in (
            (200, b"<html>", r"/v1/completions: Expecting value"),
            (200, b"[]", r": no answer with log-probabilities: \[\]"),
            (200, reply(None, -1.0), r" gives no token ids \(return_token_ids\); take vLLM"),
            (200, reply([7, 8], -1.0), r": no answer with log-probabilities"),
            (200, reply([7, 8], -1.0, -1.0), r" ends an answer after 2 of 3 tokens"),
            (200, reply([end, 8], -1.0, -1.0), r" goes on after the token that ends an answer"),
            (200, reply([VOCAB], -1.0), r": token 400 with log-probability -1.0 cannot be trained on"),
            (200, reply([7], float("nan")), r": token 7 with log-probability nan cannot"),
            (
                405,
                b'{"detail":\n"Not Allowed"}',
                r"405 .*Not Allowed.*; start vLLM with VLLM_SERVER_DEV_MODE=1, minimi",
            ),
            (200, b"hang", r"timed out"),
        ):
            monkeypatch.setattr(FakeServer, "status", status)
            monkeypatch.setattr(FakeServer, "said", said)
            client = make_client(tokenizer, url, 0.5 if said == b"hang" else 60)
            with pytest.raises(UserError, match=message) as error:
                client._complete([Rollout(Question([5], [6], 0), tokenizer, 3, temperature=1.0)])
            assert "\n" not in str(error.value) and url in str(error.value)
        FakeServer.is_done.set()
        server.shutdown()
