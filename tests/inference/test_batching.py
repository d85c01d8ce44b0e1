"""The queue in front of the model: who waits, who joins, and whose place becomes free."""

import contextlib
import dataclasses
import http.client
import json
import queue
import threading
import time
from collections.abc import Iterator

import pytest
import torch

from minimind.checkpoints.formats.load_model import load_model
from minimind.errors import UserError
from minimind.inference.batching import Batcher, QueueFull, Request, Update
from minimind.inference.generation import complete
from minimind.inference.sampling import GenerationOptions
from minimind.model import MiniMindForCausalLM
from minimind.serve import listen

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
http_api = pytest.importorskip("minimind.inference.http_api")

KEY = "a secret"


class RecordingBatcher(Batcher):
    """Says which requests were given up: their tokens by then."""

    def __init__(self, *args, **options) -> None:
        self.given_up: queue.Queue[int] = queue.Queue()
        super().__init__(*args, **options)

    def cancel(self, request: Request) -> None:
        super().cancel(request)
        self.given_up.put(len(request.new_tokens))


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
def test_a_client_that_goes_frees_its_place(gated, gate, expected_answer, stream):
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
    (choice,) = client.chat.completions.create(**body | {"model": "tiny-model", "stream": False}).choices
    assert choice.message.content == expected_answer("hello")


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


def test_new_weights_are_for_requests_that_join_later(batcher, model):
    """What runs ends by the old ones, and nothing joins it until then."""
    torch.manual_seed(1)
    other = MiniMindForCausalLM(model[0].config)
    options = [GenerationOptions(temperature=0.0, max_new_tokens=count) for count in (300, 9)]
    ended: queue.SimpleQueue[str] = queue.SimpleQueue()
    texts = {"old": "", "new": ""}

    def ask(name: str, place: int) -> None:
        def deliver(update: Update) -> None:
            texts[name] += update.text
            if update.reason:
                ended.put(name)

        batcher.submit([Request(model[1], "the fox", options[place], deliver)])

    ask("old", 0)
    while batcher.num_waiting:
        time.sleep(0.001)
    batcher.exchange(other)
    ask("new", 1)
    assert [ended.get(timeout=60) for _ in texts] == ["old", "new"]
    for (name, text), which, option in zip(texts.items(), (model[0], other), options, strict=True):
        assert [text] == [found.text for found in complete(which, model[1], ["the fox"], option)], name
