"""Tools and thinking, as the official openai client sees them: the model's tokens are given, the rest is the server."""

import asyncio
import dataclasses
import json
import threading
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from tokenizers_for_tests import save_byte_level

from minimind.data.chat_template import load_chat_template
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.inference.batching import Batcher, Request
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.serve import listen

openai = pytest.importorskip("openai")
uvicorn = pytest.importorskip("uvicorn")
http_api = pytest.importorskip("minimind.inference.http_api")

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object", "properties": {"a": {}}}}}
CALL = '<tool_call>\n{"name": "add", "arguments": {"a":  1, "b": "二"}}\n</tool_call>'
CALLED = f"<think>\nso it is\n</think>\n\nlet me see\n{CALL}\n{CALL}"
BROKEN = "see\n<tool_call>\n{'name': 'add'}\n</tool_call>"
SCRIPTS = [CALLED, "it is 三", BROKEN, "so\n</think>\n\nyes", "<think>\nno end", f"{CALL}"]
QUESTION = {"role": "user", "content": "the fox"}


class RecordingBatcher(Batcher):
    """Keeps the prompts."""

    def __init__(self, *args: Any, **options: Any) -> None:
        self.prompts: list[list[int]] = []
        super().__init__(*args, **options)

    def submit(self, requests: list[Request]) -> None:
        self.prompts += [list(request.tokens) for request in requests]
        super().submit(requests)


@dataclasses.dataclass
class Served:
    client: "openai.OpenAI"
    batcher: RecordingBatcher
    tokenizer: Tokenizer

    def ask(self, script: int, messages: list[Any] | None = None, **options: Any) -> Any:
        """The model answers with the script of this number."""
        given = {"model": "m", "messages": messages or [QUESTION], "seed": script, "temperature": 1.0, **options}
        return self.client.chat.completions.create(**given)

    def prompt_text(self) -> str:
        """The newest prompt."""
        return self.tokenizer.decode(self.batcher.prompts[-1])


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    folder = tmp_path_factory.mktemp("served")
    tokenizer = load_tokenizer(save_byte_level(folder))
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size))
    scripts = [[*tokenizer.encode(text), tokenizer.special_ids["<|im_end|>"]] for text in SCRIPTS]
    places: dict[Any, int] = {}

    def draw(logits: Any, options: Any, randoms: Any, tokens: Any, vocab_size: int) -> torch.Tensor:
        drawn = []
        for option, random in zip(options, randoms, strict=True):
            places[random] = places.get(random, -1) + 1
            drawn.append(scripts[option.seed][places[random]])
        return torch.tensor(drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("minimind.inference.decoding.draw", draw)
        batcher = RecordingBatcher(model, tokenizer, max_batch_size=3, max_waiting=20)
        app = http_api.build_app(batcher, tokenizer, model_name="m", defaults=GenerationOptions(), api_key=None)
        listener = listen("127.0.0.1", 0)
        server = uvicorn.Server(uvicorn.Config(app, log_level="warning"))
        thread = threading.Thread(target=server.run, args=([listener],))
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
        with openai.OpenAI(base_url=url, api_key="none", max_retries=0, timeout=60) as client:
            yield Served(client, batcher, tokenizer)
        server.should_exit = True
        thread.join()
        batcher.close()


def join(stream: Any) -> tuple[dict[str, Any], list[str]]:
    """The message that the deltas of a stream make, and the kinds of its deltas in order."""
    message: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": [], "end": None}
    kinds: list[str] = []
    for event in stream:
        (choice,) = event.choices
        assert message["end"] is None, "something follows the end"
        message["end"] = choice.finish_reason
        delta = choice.delta.model_dump(exclude_none=True)
        for kind in ("content", "reasoning_content"):
            message[kind] += delta.get(kind, "")
        for call in delta.get("tool_calls", []):
            assert call.pop("index") == len(message["tool_calls"])
            message["tool_calls"].append(call)
        kinds += [kind for kind in ("reasoning_content", "content", "tool_calls") if delta.get(kind)]
    return message, kinds


def test_calls_and_thinking_in_one_piece(served: Served) -> None:
    choice = served.ask(0, tools=[ADD]).choices[0]
    assert choice.finish_reason == "tool_calls"
    assert choice.message.content == "let me see" and choice.message.reasoning_content == "so it is"
    first, second = choice.message.tool_calls
    assert first.type == "function" and first.id != second.id and first.id.startswith("call_")
    assert (first.function.name, first.function.arguments) == ("add", '{"a":  1, "b": "二"}')
    only = served.ask(5, tools=[ADD], tool_choice="auto").choices[0]
    assert only.message.content is None and only.finish_reason == "tool_calls"


def test_a_stream_says_the_same_piece_by_piece(served: Served) -> None:
    whole = served.ask(0, tools=[ADD]).choices[0].message
    message, kinds = join(served.ask(0, tools=[ADD], stream=True))
    assert (message["content"], message["reasoning_content"]) == (whole.content, whole.reasoning_content)
    assert [call["function"] for call in message["tool_calls"]] == [
        call.function.model_dump() for call in whole.tool_calls
    ]
    assert len({call["id"] for call in message["tool_calls"]}) == 2 and message["end"] == "tool_calls"
    assert list(dict.fromkeys(kinds)) == ["reasoning_content", "content", "tool_calls"] and kinds.count("content") > 2


def test_the_history_has_the_ids_that_were_generated(served: Served) -> None:
    """What the client sends back is what the model has said, with the results behind it in the order of the calls."""
    message = served.ask(0, tools=[ADD]).choices[0].message
    before = served.batcher.prompts[-1]
    first, second = message.tool_calls
    results = [
        {"role": "tool", "tool_call_id": call.id, "content": text} for call, text in ((second, "2"), (first, "1"))
    ]
    history = [QUESTION, message.model_dump(exclude_none=True), *results]
    assert served.ask(1, history, tools=[ADD]).choices[0].message.content == "it is 三"
    generated = [*served.tokenizer.encode(CALLED), served.tokenizer.special_ids["<|im_end|>"]]
    assert served.batcher.prompts[-1][: len(before) + len(generated)] == before + generated
    end = "<|im_end|>\n<|im_start|>tool\n1<|im_end|>\n<|im_start|>tool\n2<|im_end|>\n<|im_start|>assistant\n"
    assert served.prompt_text().endswith(end)


def test_a_call_that_is_none_is_content(served: Served) -> None:
    choice = served.ask(2, tools=[ADD]).choices[0]
    assert (choice.message.content, choice.message.tool_calls, choice.finish_reason) == (BROKEN, None, "stop")
    message, _ = join(served.ask(2, tools=[ADD], stream=True))
    assert (message["content"], message["tool_calls"], message["end"]) == (BROKEN, [], "stop")
    cut = served.ask(5, tools=[ADD], max_tokens=20).choices[0]
    assert cut.finish_reason == "length" and cut.message.content and CALL.startswith(cut.message.content)


def test_tools_are_in_the_prompt_as_the_client_gave_them(served: Served) -> None:
    served.ask(1, tools=[ADD])
    assert json.dumps(ADD) in served.prompt_text()
    for options in ({"tools": [ADD], "tool_choice": "none"}, {}):
        choice = served.ask(5, **options).choices[0]
        assert (choice.message.content, choice.finish_reason) == (CALL, "stop") and "add" not in served.prompt_text()


def test_thinking_is_turned_on_by_the_request(served: Served) -> None:
    body = {"chat_template_kwargs": {"enable_thinking": True}}
    message, _ = join(served.ask(3, stream=True, extra_body=body))
    assert (message["reasoning_content"], message["content"]) == ("so", "yes")
    assert served.prompt_text().endswith("assistant\n<think>\n")
    off = served.ask(3, extra_body={"chat_template_kwargs": {"enable_thinking": False}}).choices[0].message
    assert off.content == "so\n</think>\n\nyes" and served.prompt_text().endswith("assistant\n")
    endless = served.ask(4).choices[0].message
    assert endless.content == "" and endless.reasoning_content == "no end"


def test_each_answer_is_read_by_itself(served: Served) -> None:
    """Two of one request, and several requests decoded together."""
    choices = served.ask(0, tools=[ADD], n=2).choices
    assert choices[0].message.reasoning_content and choices[1].message.content == "it is 三"
    contents = ["", ""]
    for event in served.ask(0, tools=[ADD], n=2, stream=True):
        contents[event.choices[0].index] += event.choices[0].delta.content or ""
    assert contents == ["let me see", "it is 三"]

    async def ask_all() -> list[Any]:
        async with openai.AsyncOpenAI(base_url=served.client.base_url, api_key="none", timeout=60) as client:
            asked = [
                client.chat.completions.create(model="m", messages=[QUESTION], seed=seed % 3, tools=[ADD])
                for seed in range(9)
            ]
            return [answer.choices[0].message.content for answer in await asyncio.gather(*asked)]

    assert asyncio.run(ask_all()) == ["let me see", "it is 三", BROKEN] * 3


def test_log_probabilities_are_those_of_every_token(served: Served) -> None:
    expected = [*served.tokenizer.encode(CALLED)]
    events = [event.choices[0] for event in served.ask(0, tools=[ADD], stream=True, logprobs=True)]
    found = [entry.token for choice in events if choice.logprobs for entry in choice.logprobs.content]
    assert len(found) in (len(expected), len(expected) + 1)  # the one that ends it may be among them


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        ([QUESTION, {"role": "tool", "content": "1", "tool_call_id": "x"}], "messages.1: a tool's message must follow"),
        (
            [{"id": "x", "arguments": "{}"}, {"role": "tool", "content": "1", "tool_call_id": "y"}],
            "no call before it has",
        ),
        ([{"id": "x", "arguments": "no"}], "function.arguments: not a JSON object, as text, not 'no'"),
        ([{"id": "x", "arguments": "[1]"}], "function.arguments: not a JSON object, as text"),
    ],
)
def test_a_wrong_history_is_a_400(served: Served, messages: list[Any], said: str) -> None:
    if "id" in messages[0]:
        function = {"name": "add", "arguments": messages[0]["arguments"]}
        calls = [{"id": messages[0]["id"], "type": "function", "function": function}]
        messages = [QUESTION, {"role": "assistant", "content": None, "tool_calls": calls}, *messages[1:]]
    with pytest.raises(openai.BadRequestError) as caught:
        served.ask(1, messages)
    assert said in caught.value.body["message"]


def test_a_template_without_thinking_or_tools_says_so(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    template = load_chat_template(served.tokenizer)
    monkeypatch.setattr(template, "reads_tools", False)
    monkeypatch.setattr(template, "thinking_variable", None)
    with pytest.raises(openai.BadRequestError, match="has no place for tools"):
        served.ask(1, tools=[ADD])
    with pytest.raises(openai.BadRequestError, match="cannot turn thinking on or off"):
        served.ask(1, extra_body={"chat_template_kwargs": {"enable_thinking": False}})
