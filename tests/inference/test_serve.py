"""The server as clients see it: the official openai client against the real command."""

import asyncio
import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from repository import ROOT

from minimind import errors
from minimind.data.chat_template import encode_chat
from minimind.errors import UserError
from minimind.inference.generation import complete
from minimind.inference.sampling import GenerationOptions
from minimind.serve import listen, main

openai = pytest.importorskip("openai")
pytest.importorskip("minimind.inference.http_api")
httpx = pytest.importorskip("httpx2" if openai.__version__.startswith("3") else "httpx")

KEY = "a secret"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}


@dataclasses.dataclass
class Server:
    """The command, running."""

    url: str
    process: subprocess.Popen

    def client(self, **options) -> "openai.OpenAI":
        settings = {"base_url": f"{self.url}/v1", "api_key": KEY, "max_retries": 0, "timeout": 60, **options}
        return openai.OpenAI(**settings)

    def memory(self) -> int:
        """Resident bytes."""
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        match = re.search(r"VmRSS:\s+(\d+) kB", status)
        assert match
        return int(match[1]) * 1024

    def waiting(self) -> int:
        return int(httpx.get(f"{self.url}/health").json()["waiting"])


@pytest.fixture(scope="module")
def server(exported) -> Iterator[Server]:
    command = [sys.executable, "-m", "minimind.serve", "--checkpoint", str(exported), "--port", "0", "--device", "cpu"]
    command += ["--max-waiting", "60", "--max-new-tokens", "24"]
    process = subprocess.Popen(
        command, cwd=ROOT, env={**os.environ, "MINIMIND_API_KEY": KEY}, stdout=subprocess.PIPE, text=True
    )
    try:
        line = process.stdout.readline()
        match = re.search(r"http://\S+:\d+", line)
        assert match, line
        yield Server(match[0], process)
    finally:
        process.terminate()
        assert process.wait(20) == -signal.SIGTERM  # uvicorn ends what runs, then passes the signal on


def ask(client, question: str, **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="tiny-model", messages=messages, temperature=0, **options)


def test_the_official_client_gets_what_generation_gives(server, model, expected_answer):
    client = server.client()
    assert [entry.id for entry in client.models.list()] == ["tiny-model"]
    assert client.models.retrieve("tiny-model").owned_by == "minimind"
    answer = ask(client, "the fox")
    assert answer.choices[0].message.content == expected_answer("the fox")
    assert answer.choices[0].finish_reason == "length" and answer.usage.completion_tokens == 24
    pieces = list(ask(client, "the fox", stream=True, stream_options={"include_usage": True}))
    text = "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)
    assert text == answer.choices[0].message.content and len(pieces) > 5
    assert pieces[-1].usage == answer.usage and pieces[-2].choices[0].finish_reason == "length"


def test_completions_take_texts_and_token_ids(server, model):
    client = server.client()
    options = GenerationOptions(temperature=0.0, max_new_tokens=9)
    (expected,) = complete(*model, ["the fox"], options)
    for prompt in ("the fox", ["the fox"], model[1].encode("the fox")):
        found = client.completions.create(model="tiny-model", prompt=prompt, max_tokens=9, temperature=0)
        assert found.choices[0].text == expected.text and found.usage.completion_tokens == 9
    stream = client.completions.create(model="tiny-model", prompt="the fox", max_tokens=9, temperature=0, stream=True)
    assert "".join(piece.choices[0].text for piece in stream) == expected.text
    stop = expected.text[3:6]
    stopped = client.completions.create(model="tiny-model", prompt="the fox", max_tokens=9, temperature=0, stop=stop)
    assert stopped.choices[0].text == expected.text[: expected.text.index(stop)]
    assert stopped.choices[0].finish_reason == "stop"
    seeded = [
        client.completions.create(model="tiny-model", prompt="x", seed=seed, extra_body={"top_k": 50}).choices[0].text
        for seed in (1, 1, 2)
    ]
    assert seeded[0] == seeded[1] != seeded[2]


def test_fifty_at_once_are_all_answered_and_none_is_mixed_up(server, model, expected_answer):
    questions = [f"{number} " + "the quick brown fox " * (number % 13) for number in range(50)]
    limits = [1 + number % 24 for number in range(50)]

    async def ask_all() -> list[str]:
        settings = {"base_url": f"{server.url}/v1", "api_key": KEY, "timeout": 120, "max_retries": 0}
        async with openai.AsyncOpenAI(**settings) as client:

            async def ask_one(number: int) -> str:
                shared = {"model": "tiny-model", "temperature": 0, "max_tokens": limits[number]}
                messages = [{"role": "user", "content": questions[number]}]
                if number % 2:
                    stream = await client.chat.completions.create(messages=messages, stream=True, **shared)
                    return "".join([piece.choices[0].delta.content or "" async for piece in stream])
                answer = await client.chat.completions.create(messages=messages, **shared)
                return answer.choices[0].message.content

            return await asyncio.gather(*(ask_one(number) for number in range(50)))

    expected = [expected_answer(*pair) for pair in zip(questions, limits, strict=True)]
    assert asyncio.run(ask_all()) == expected and len(set(expected)) > 20
    before = server.memory()
    for _ in range(2):
        assert asyncio.run(ask_all()) == expected
    assert server.waiting() == 0
    assert server.memory() - before < 8 << 20, "two more rounds of fifty should take no more memory than the first"


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b"{", "the body is not JSON: Expecting property name enclosed in double quotes (character 1)"),
        (b"\xff", "parsing the body"),
        (b"[]", "the body: Input should be a valid dictionary"),
        (b"", "the body: Field required"),
        (b'{"messages": []}', "messages: List should have at least 1 item"),
        (b'{"messages": [{"role": "function", "content": "x"}]}', "role: Input should be 'system', 'developer'"),
        (b'{"messages": [{"role": "tool", "content": "x"}]}', "messages.0: a tool's message must follow the call"),
        (b'{"messages": [{"role": "user", "content": 3}]}', "messages.0.content"),
        (b'{"messages": [{"role": "user", "content": null}]}', "messages.0: a message of the user needs content"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image_url"}]}]}', "type: Input should be 'text', not"),
        (b'{"messages": [{"role": "user", "content": "\\ud800"}]}', "lone surrogate"),
        (
            b'{"messages": [{"role": "user", "content": "x", "tool_calls": [{}]}]}',
            "tool_calls.0.function: Field required",
        ),
        (
            b'{"messages": [{"role": "user", "content": "x", "reasoning_content": "y"}]}',
            "messages.0: reasoning_content and tool_calls are the assistant's, not the user's",
        ),
        ({"model": "gpt-4"}, "there is no model 'gpt-4', only 'tiny-model'"),
        ({"n": 0}, "n: Input should be greater than or equal to 1, not 0"),
        ({"n": 61}, "1 prompts with n 61 ask for more than the 60 answers that may wait"),
        ({"best_of": 2}, "best_of: Input should be 1, not 2"),
        ({"tools": [{}]}, "tools: number 0 is not a function with a name"),
        ({"tools": [TOOL | {"function": {"name": "f", "strict": True}}]}, "tools: strict is not supported"),
        ({"tools": [TOOL], "parallel_tool_calls": False}, "parallel_tool_calls: the model cannot be kept to one call"),
        ({"functions": [{"name": "f"}]}, "functions is not supported"),
        ({"tool_choice": "required"}, "tool_choice: a call cannot be forced: give 'none' or 'auto', not 'required'"),
        ({"tool_choice": TOOL}, "tool_choice: a call cannot be forced: give 'none' or 'auto'"),
        ({"chat_template_kwargs": {"enable_thinking": "maybe"}}, "chat_template_kwargs.enable_thinking: Input should"),
        ({"chat_template_kwargs": {"depth": 3}}, "depth is not supported"),
        (
            {"response_format": {"type": "json_object"}},
            "response_format.type: Input should be 'text', not 'json",
        ),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs: Input should be less than or equal to 20, not 21"),
        ({"logit_bias": {"5": 1}}, "logit_bias is not supported"),
        ({"temperature": -1}, "temperature: -1.0 is not"),
        ({"top_p": 2}, "top_p: 2.0 is not"),
        ({"max_tokens": 0}, "max_tokens: Input should be greater than or equal to 1, not 0"),
        ({"max_tokens": 100000}, "beyond the model's 512"),
        ({"content": "x " * 600}, "beyond the model's 512"),
        ({"stop": ["x"] * 65}, "stop: List should have at most 64 items"),
    ],
)
def test_a_wrong_request_is_a_4xx_with_the_reason(server, body, said):
    if isinstance(body, dict):
        content = body.pop("content", "x")
        body = json.dumps({"messages": [{"role": "user", "content": content}], **body}).encode()
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    answer = httpx.post(f"{server.url}/v1/chat/completions", content=body, headers=headers)
    assert 400 <= answer.status_code < 500 and said in answer.json()["error"]["message"], answer.text


@pytest.mark.parametrize(
    "extra",
    [
        {"n": 1, "response_format": {"type": "text"}, "tool_choice": "none", "tools": [], "logprobs": False},
        {"stop": [f"no such text {number}" for number in range(64)], "presence_penalty": 0, "user": "somebody"},
    ],
)
def test_fields_that_change_nothing_change_nothing(server, expected_answer, extra):
    answer = ask(server.client(), "the fox", **extra)
    assert answer.choices[0].message.content == expected_answer("the fox")


def test_a_turn_of_the_assistant_may_be_empty(server, model):
    messages = [{"role": "user", "content": "the fox"}, {"role": "assistant", "content": None}]
    messages.append({"role": "user", "content": [{"type": "text", "text": "the "}, {"type": "text", "text": "dog"}]})
    answer = server.client().chat.completions.create(model="tiny-model", messages=messages, temperature=0)
    turns = [
        {"role": "user", "content": "the fox"},
        {"role": "assistant", "content": ""},
        {"role": "user", "content": "the dog"},
    ]
    options = GenerationOptions(temperature=0.0, max_new_tokens=24)
    (expected,) = complete(*model, [encode_chat(model[1], turns)], options)
    assert answer.choices[0].message.content == expected.text


def test_several_answers_to_several_prompts(server, model):
    """Each as alone: the answers to one prompt draw with seed, seed + 1 and so on."""
    client, prompts = server.client(), ["the fox", "a lazy dog"]
    shared = {"model": "tiny-model", "max_tokens": 9, "temperature": 0.9, "seed": 5, "n": 2}
    expected = [
        complete(*model, [prompt], GenerationOptions(temperature=0.9, max_new_tokens=9, seed=seed))[0].text
        for prompt in prompts
        for seed in (5, 6)
    ]
    for given in (prompts, [model[1].encode(prompt) for prompt in prompts]):
        found = client.completions.create(prompt=given, **shared)
        assert [choice.text for choice in found.choices] == expected and len(set(expected)) == 4
        assert [choice.index for choice in found.choices] == [0, 1, 2, 3]
        lengths = [len(model[1].encode(prompt)) for prompt in prompts]
        assert found.usage.prompt_tokens == sum(lengths) and found.usage.completion_tokens == 36
    texts = [""] * 4
    for piece in client.completions.create(prompt=prompts, stream=True, **shared):
        texts[piece.choices[0].index] += piece.choices[0].text
    assert texts == expected
    messages = [{"role": "user", "content": "the fox"}]
    whole = client.chat.completions.create(messages=messages, **shared)
    contents = [""] * 2
    for chunk in client.chat.completions.create(messages=messages, stream=True, **shared):
        contents[chunk.choices[0].index] += chunk.choices[0].delta.content or ""
    assert contents == [choice.message.content for choice in whole.choices] and contents[0] != contents[1]


def test_log_probabilities_of_an_answer(server, model):
    client, options = server.client(), GenerationOptions(temperature=0.0, max_new_tokens=24)
    shared = {"logprobs": True, "top_logprobs": 3}
    answer = ask(client, "the fox", **shared).choices[0]
    prompt = encode_chat(model[1], [{"role": "user", "content": "the fox"}])
    (expected,) = complete(*model, [prompt], options)
    with torch.no_grad():
        scores = (
            model[0](torch.tensor([[*prompt, *expected.token_ids]])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
        )
    entries = answer.logprobs.content
    assert b"".join(bytes(entry.bytes) for entry in entries).decode(errors="replace") == expected.text
    for entry, token, row in zip(entries, expected.token_ids, scores, strict=True):
        assert entry.logprob == pytest.approx(float(row[token]), abs=1e-3)
        assert [top.logprob for top in entry.top_logprobs] == pytest.approx(row.topk(3).values.tolist(), abs=1e-3)
        assert entry.top_logprobs[0].token == entry.token
    pieces = [piece.choices[0] for piece in ask(client, "the fox", stream=True, **shared) if piece.choices]
    assert [entry for piece in pieces if piece.logprobs for entry in piece.logprobs.content] == entries
    text = client.completions.create(model="tiny-model", prompt="the fox", max_tokens=9, temperature=0, logprobs=2)
    found = text.choices[0].logprobs
    assert len(found.tokens) == len(found.token_logprobs) == len(found.text_offset) == 9
    assert found.text_offset[3] == len("".join(found.tokens[:3])) and len(found.top_logprobs[0]) == 2


def test_keys_sizes_and_unknown_places(server):
    def post(size: int, key: str = KEY) -> "httpx.Response":
        headers = {"Authorization": f"Bearer {key}", "Content-Type": "application/json"}
        return httpx.post(f"{server.url}/v1/completions", content=b" " * size, headers=headers)

    for key in ("x", "wrong", KEY + "x"):
        assert post(10, key).status_code == 401
    assert httpx.get(f"{server.url}/v1/models").status_code == 401
    with pytest.raises(openai.AuthenticationError, match="the API key is missing or wrong"):
        server.client(api_key="wrong").models.list()
    assert post((1 << 20) + 1).status_code == 413
    headers = {"Authorization": f"Bearer {KEY}"}
    chunked = httpx.post(f"{server.url}/v1/completions", content=iter([b"{}"]), headers=headers)
    assert chunked.status_code == 411
    assert httpx.get(f"{server.url}/v1/nothing", headers=headers).status_code == 404
    assert httpx.get(f"{server.url}/v1/models/other", headers=headers).json()["error"]["message"].startswith("there is")
    page = httpx.get(server.url)
    assert page.status_code == 200 and "<title>MiniMind</title>" in page.text
    assert httpx.get(f"{server.url}/../http_api.py").status_code == 404


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--port", "99999"], "port: 99999 is not a number from 0 to 65535"),
        (["--max-waiting", "0"], "max_waiting: 0 is not"),
        (["--stop-token-ids", "3"], "stop_token_ids has no effect"),
        (["--api-key-file", "/nowhere"], "/nowhere cannot be read"),
        (["--host", "256.0.0.1"], "256.0.0.1"),
        (["--checkpoint", "/nowhere", "--port", "0"], "/nowhere does not exist"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, exported, flags, said):
    with pytest.raises(SystemExit) as caught:
        errors.run_main(lambda: main(["--checkpoint", str(exported), *flags]))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


def test_a_port_that_is_taken_is_said_before_the_model_is_loaded(capsys):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"port {port}: Address already in use"):
            main(["--checkpoint", "/nowhere", "--port", str(port)])
    with listen("127.0.0.1", 0) as starting, pytest.raises(UserError, match="Address already in use"):
        listen("127.0.0.1", starting.getsockname()[1])
