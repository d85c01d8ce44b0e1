"""The server, as clients see it: the official openai client against the real command, and the page in a browser."""

import asyncio
import contextlib
import dataclasses
import http.client
import json
import os
import queue
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch
from repository import ROOT
from tokenizers_for_tests import save_byte_level

from minimind import errors
from minimind.checkpoints.formats.load_model import load_model
from minimind.data.chat_template import encode_chat
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.inference.batching import Batcher, QueueFull, Request, Update
from minimind.inference.decoding import Decoding
from minimind.inference.generation import complete
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.serve import listen, main

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
http_api = pytest.importorskip("minimind.inference.http_api")
httpx = pytest.importorskip("httpx2" if openai.__version__.startswith("3") else "httpx")

KEY = "a secret"
TOOL = {"type": "function", "function": {"name": "f", "parameters": {"type": "object", "properties": {}}}}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A random model that says something of every prompt, and says it long."""
    folder = tmp_path_factory.mktemp("served") / "tiny-model"
    tokenizer = load_tokenizer(save_byte_level(folder))
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    MiniMindForCausalLM(config).save_pretrained(folder)
    return folder


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


@pytest.fixture(scope="module")
def model(exported):
    return load_model(exported)[0], load_tokenizer(exported)


def expected_answer(model, question: str, max_new_tokens: int = 24) -> str:
    options = GenerationOptions(temperature=0.0, max_new_tokens=max_new_tokens)
    prompt = encode_chat(model[1], [{"role": "user", "content": question}])
    return complete(model[0], model[1], [prompt], options)[0].text


def ask(client, question: str, **options):
    messages = [{"role": "user", "content": question}]
    return client.chat.completions.create(model="tiny-model", messages=messages, temperature=0, **options)


def test_the_official_client_gets_what_generation_gives(server, model):
    client = server.client()
    assert [entry.id for entry in client.models.list()] == ["tiny-model"]
    assert client.models.retrieve("tiny-model").owned_by == "minimind"
    answer = ask(client, "the fox")
    assert answer.choices[0].message.content == expected_answer(model, "the fox")
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


def test_fifty_at_once_are_all_answered_and_none_is_mixed_up(server, model):
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

    expected = [expected_answer(model, *pair) for pair in zip(questions, limits, strict=True)]
    assert asyncio.run(ask_all()) == expected and len(set(expected)) > 20
    before = server.memory()
    for _ in range(2):
        assert asyncio.run(ask_all()) == expected
    assert server.waiting() == 0
    assert server.memory() - before < 8 << 20, "two more rounds of fifty should take no more memory than the first"


class RecordingBatcher(Batcher):
    """Says which requests were given up: their tokens by then."""

    def __init__(self, *args, **options) -> None:
        self.given_up: queue.Queue[int] = queue.Queue()
        super().__init__(*args, **options)

    def cancel(self, request: Request) -> None:
        super().cancel(request)
        self.given_up.put(len(request.new_tokens))


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """No token is decoded before it is set."""
    gate, step = threading.Event(), Decoding.step

    def step_behind_gate(decoding: Decoding):
        gate.wait()
        return step(decoding)

    monkeypatch.setattr(Decoding, "step", step_behind_gate)
    yield gate
    gate.set()


@pytest.fixture
def gated(model, gate) -> Iterator[tuple[RecordingBatcher, str]]:
    """The application over a batcher behind the gate, and its address."""
    batcher = RecordingBatcher(*model, max_batch_size=1, max_waiting=3)
    options = GenerationOptions(temperature=0.0, max_new_tokens=24)
    app = http_api.build_app(batcher, model[1], model_name="tiny-model", defaults=options, api_key=KEY)
    listener = listen("127.0.0.1", 0)
    uvicorn_server = uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5))
    thread = threading.Thread(target=uvicorn_server.run, args=([listener],))
    thread.start()
    yield batcher, f"127.0.0.1:{listener.getsockname()[1]}"
    gate.set()
    uvicorn_server.should_exit = True
    thread.join()
    batcher.close()


@pytest.mark.parametrize("stream", [True, False])
def test_a_client_that_goes_frees_its_place(gated, gate, model, stream):
    batcher, address = gated
    body = {"messages": [{"role": "user", "content": "hello"}], "temperature": 0, "stream": stream}
    headers = {"Authorization": f"Bearer {KEY}", "Content-Type": "application/json"}
    with contextlib.closing(http.client.HTTPConnection(address)) as connection:
        connection.request("POST", "/v1/chat/completions", json.dumps(body), headers)
        if stream:
            assert b"assistant" in connection.getresponse().readline()
    # No token can have come: the gate is shut. Only the client's going can free the place.
    assert batcher.given_up.get(timeout=60) == 0
    gate.set()
    client = openai.OpenAI(base_url=f"http://{address}/v1", api_key=KEY, max_retries=0, timeout=60)
    assert ask(client, "the fox").choices[0].message.content == expected_answer(model, "the fox")


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
def test_fields_that_change_nothing_change_nothing(server, model, extra):
    answer = ask(server.client(), "the fox", **extra)
    assert answer.choices[0].message.content == expected_answer(model, "the fox")


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


# --- the queue --------------------------------------------------------------------------------------------------------


@pytest.fixture
def batcher(model) -> Iterator[Batcher]:
    batcher = Batcher(*model, max_batch_size=2, max_waiting=3)
    yield batcher
    batcher.close()


def test_the_queue_is_bounded_and_a_place_given_up_is_free(batcher, model):
    updates: dict[int, list[Update]] = {number: [] for number in range(7)}
    options = GenerationOptions(temperature=0.0, max_new_tokens=400)

    def submit(number: int) -> Request:
        request = Request(model[1], f"{number} fox", options, updates[number].append)
        batcher.submit([request])
        return request

    first = submit(0)
    while batcher.num_waiting:
        time.sleep(0.001)
    waiting = [submit(number) for number in (1, 2, 3)]
    with pytest.raises(QueueFull):
        submit(4)
    batcher.cancel(waiting[0])
    assert batcher.num_waiting == 2
    submit(4)
    batcher.cancel(first)
    deadline = time.monotonic() + 60
    while not all(updates[n] and updates[n][-1].reason for n in (2, 3, 4)) and time.monotonic() < deadline:
        time.sleep(0.01)
    (expected,) = complete(*model, [model[1].encode("4 fox")], options)
    assert "".join(update.text for update in updates[4]) == expected.text and updates[4][-1].num_tokens == 400
    assert not updates[1] and not any(update.reason for update in updates[0])


def test_a_long_prompt_and_a_long_answer_fit_side_by_side(batcher, model):
    """Together they are beyond the model's 512 positions, each alone is not."""
    done: list[Update] = []
    long_prompt = Request(model[1], [5] * 500, GenerationOptions(max_new_tokens=5), done.append)
    long_answer = Request(model[1], [5] * 5, GenerationOptions(max_new_tokens=300), done.append)
    batcher.submit([long_prompt, long_answer])
    deadline = time.monotonic() + 60
    while sum(update.reason is not None for update in done) < 2 and time.monotonic() < deadline:
        time.sleep(0.01)
    assert all(update.reason in (None, "length", "stop") for update in done)
    with pytest.raises(UserError, match="beyond the model's 512"):
        batcher.submit([Request(model[1], [5] * 510, GenerationOptions(max_new_tokens=5), done.append)])


def test_a_short_request_does_not_wait_for_a_long_one(batcher, model, gate):
    """It joins between two tokens, and the tokens of both are those they get alone."""
    options = GenerationOptions(temperature=0.0, max_new_tokens=200, stop_token_ids=())
    taken: list[tuple[str, Update]] = []
    requests = {
        name: Request(model[1], f"{name} fox", dataclasses.replace(options, max_new_tokens=count), deliver)
        for name, count, deliver in (
            ("long", 200, lambda update: taken.append(("long", update))),
            ("short", 1, lambda update: taken.append(("short", update))),
        )
    }
    gate.set()
    batcher.submit([requests["long"]])
    while len(requests["long"].new_tokens) < 3:
        time.sleep(0.001)
    before = len(requests["long"].new_tokens)
    batcher.submit([requests["short"]])
    while requests["short"].reason is None:
        time.sleep(0.001)
    after = len(requests["long"].new_tokens)
    while requests["long"].reason is None:
        time.sleep(0.001)
    assert after - before < 50 and taken[-1][0] == "long" and taken[-1][1].reason == "length"
    for name, request in requests.items():
        (alone,) = complete(*model, [f"{name} fox"], request.options)
        assert tuple(request.new_tokens) == alone.token_ids
        assert "".join(update.text for who, update in taken if who == name) == alone.text


def test_an_error_of_the_model_reaches_the_client_and_the_server_goes_on(exported, model):
    broken, tokenizer = load_model(exported)[0], model[1]
    norm = broken.model.norm.weight.detach().clone()
    with torch.no_grad():
        broken.model.norm.weight.fill_(float("nan"))
    batcher = Batcher(broken, tokenizer, max_batch_size=2, max_waiting=3)
    for reason in ("error", "length"):
        done: list[Update] = []
        options = GenerationOptions(max_new_tokens=3, temperature=0.0)
        batcher.submit([Request(tokenizer, [5, 6], options, done.append)])
        while not done or done[-1].reason is None:
            time.sleep(0.005)
        assert done[-1].reason == reason
        with torch.no_grad():
            broken.model.norm.weight.copy_(norm)
    batcher.close()
    with pytest.raises(QueueFull):
        batcher.submit([Request(tokenizer, [5], GenerationOptions(), done.append)])


# --- the command ------------------------------------------------------------------------------------------------------


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


# --- the page ---------------------------------------------------------------------------------------------------------


SERVER_OF_THE_PAGE = """
import asyncio
import contextlib
from pathlib import Path
from minimind import serve
from minimind.inference import http_api

http_api.PAGE = Path(__file__).with_name("page")
build_app = http_api.build_app

def build_with_wait(*args, **options):
    app, done = build_app(*args, **options), asyncio.Event()
    async def say_done():
        done.set()
    async def wait():
        await done.wait()
    app.get("/done")(say_done)
    app.get("/wait")(wait)
    app.router.routes[:0] = [app.router.routes.pop() for _ in range(2)]
    return app

serve.build_app = build_with_wait
serve.main()
"""

MARKDOWN = """
# 标题 title
**bold**, `code`, $e^{i\\pi}$, 5$ and 10$, \\(x_1\\)

$$\\frac{1}{2}$$

```python title="<script>run()</script>"
if a < b: print("<b>")
```

| a | b |
|---|---|
| 1 | $x^2$ |
"""
HOSTILE = """
<img src=x onerror="run()"> <script>run()</script> <svg onload=run()> <a href="javascript:run()">x</a>
[a](javascript:run() "<img src=x onerror=run()>") [b](https://example.org "\\" onmouseover=run() \\"")
![c](x "<script>")
`<script>run()</script>` $<img src=x onerror=run()>$ $\\href{javascript:run()}{y}$ <style>body{display:none}</style>
```<img src=x onerror=run()>
<iframe src=javascript:run()></iframe>
```
"""


class Page(HTMLParser):
    """What a page has: (tag, attributes) of its elements."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs) -> None:
        self.elements.append((tag, dict(attrs)))

    def count(self, **wanted: str) -> int:
        """Elements with this tag, or with this class among theirs."""
        tag, name = wanted.get("tag"), wanted.get("name")
        return sum(
            (tag is None or tag == found) and (name is None or name in (attributes.get("class") or "").split())
            for found, attributes in self.elements
        )


@pytest.mark.skipif(CHROMIUM is None, reason="no chromium in PATH (Debian: apt-get install chromium)")
def test_the_page_holds_a_conversation_in_a_browser(exported, model, tmp_path):
    """The page and lines that show and ask; an image keeps it loading until the answer is there."""
    shutil.copytree(ROOT / "minimind/inference/chat_page", tmp_path / "page")
    calls = [{"function": {"name": HOSTILE, "arguments": text}} for text in ('{"x": "<b>"}', "<script>run()</script>")]
    answers = [{"content": MARKDOWN}, {"content": HOSTILE}, {"reasoning": "so *it* is\n" + HOSTILE, "calls": calls}]
    shown = "".join(f"update(addTurn('assistant'), {json.dumps(answer)}, true);\n" for answer in answers)
    asked = 'at("temperature").value = "0"; at("limit").value = "12"; ask("<b>fox</b>").then(() => {'
    asked += "document.body.dataset.said = messages.at(-1).content;"
    asked += 'messages.at(-1).tool_calls = ["add", "<sub>"].map(name => ({id: name, function: {name}}));'
    asked += 'ask("<b>1</b>"); document.body.dataset.results = JSON.stringify(results); fetch("done"); });'
    hacked = 'function run() { document.title = "hacked"; }\n'
    with open(tmp_path / "page/chat.js", "a", encoding="utf-8") as script:
        script.write(hacked + shown + asked)
    index = (tmp_path / "page/index.html").read_text(encoding="utf-8")
    (tmp_path / "page/index.html").write_text(index.replace("</body>", "<img src=wait></body>"), encoding="utf-8")
    (tmp_path / "server.py").write_text(SERVER_OF_THE_PAGE, encoding="utf-8")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); import server"
    command = [sys.executable, "-c", code, "--checkpoint", str(exported), "--port", "0", "--name", "<img src=x>"]
    process = subprocess.Popen([*command, "--device", "cpu"], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    try:
        url = re.search(r"http://\S+:\d+/", process.stdout.readline())[0]
        browser = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
        done = subprocess.run([*browser, "--dump-dom", url], capture_output=True, text=True, timeout=120)
    finally:
        process.terminate()
        process.wait(20)
    turns = re.findall(r'<div class="turn (\w+)">(.*?)(?=<div class="turn|</main>)', done.stdout, re.S)
    roles = ["assistant", "assistant", "assistant", "user", "assistant", "tool"]
    assert [role for role, _ in turns] == roles, done.stdout + done.stderr
    markdown, hostile, thought, question, answer, result = (text for _, text in turns)
    page = Page(markdown)
    tags = ("h1", "strong", "code", "pre", "table")
    assert [page.count(tag=tag) for tag in tags] == [1, 1, 2, 1, 1] and page.count(name="copy") == 2
    assert (page.count(name="katex"), page.count(name="katex-display"), page.count(name="katex-error")) == (4, 1, 0)
    assert 'lang="zh-CN"' in markdown and "5$ and 10$" in markdown and "if a &lt; b:" in markdown

    for tag, attributes in Page(done.stdout).elements:
        assert tag not in ("svg", "iframe", "object", "style") and not any(name.startswith("on") for name in attributes)
        assert tag != "img" or attributes.get("src") == "wait"
        assert tag != "script" or attributes.get("src", "").endswith(".js")
        assert not (attributes.get("href") or "").startswith("javascript:")
    assert '&lt;img src=x onerror="run()"&gt; &lt;script&gt;run()&lt;/script&gt; &lt;svg onload=run()&gt;' in hostile
    for place in ("title", 'h1 id="name"'):
        assert f"<{place}>&lt;img src=x&gt;</" in done.stdout
    assert "&lt;b&gt;fox&lt;/b&gt;" in question
    assert "<details><summary>Thought</summary>" in thought and "so <em>it</em> is" in thought  # folded
    page = Page(thought)
    assert page.count(name="call") == 2 and page.count(tag="img") == page.count(tag="script") == 0
    assert '"x": "&lt;b&gt;"' in thought and "&lt;script&gt;run()&lt;/script&gt;</pre>" in thought
    assert "&lt;b&gt;1&lt;/b&gt;" in result and 'placeholder="Result of <sub>"' in done.stdout.replace(
        "&lt;", "<"
    ).replace("&gt;", ">")
    (body,) = [attributes for tag, attributes in Page(done.stdout).elements if tag == "body"]
    assert json.loads(body["data-results"]) == [{"role": "tool", "tool_call_id": "add", "content": "<b>1</b>"}]
    assert body["data-said"] == expected_answer(model, "<b>fox</b>", 12) and "…" not in answer
