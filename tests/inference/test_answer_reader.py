"""Thinking, content and tool calls in a text that grows."""

import itertools
import json
import random
from typing import Any

import pytest
from tokenizers_for_tests import save_byte_level, save_sentencepiece

from minimind.data.chat_template import ChatTemplate, default_template
from minimind.data.tokenizer import load_tokenizer
from minimind.inference.answer_reader import AnswerReader, ToolCall, read_message

CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 1,  "b": [2, "加"]}}\n</tool_call>'
ADD = ToolCall("add", '{"a": 1,  "b": [2, "加"]}')
OTHER = '<tool_call>{"name": "f", "arguments": {}}</tool_call>'
MARK_INSIDE = '<tool_call>{"name": "say", "arguments": {"text": "a </tool_call> \\" </tool_call>"}}</tool_call>'
BROKEN = [
    "<tool_call>\n{'name': 'add'}\n</tool_call>",
    '<tool_call>{"name": "add", "arguments": 5}</tool_call>',
    '<tool_call>{"name": "", "arguments": {}}</tool_call>',
    '<tool_call>{"name": "\\ud800", "arguments": {}}</tool_call>',
    '<tool_call>{"arguments": {}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": NaN}}</tool_call>',
    '<tool_call>{"name": "f", "arguments": {"x": ' + "[" * 100_000 + "</tool_call>",
    "<tool_call>[]</tool_call>",
    "<tool_call></tool_call>",
    '<tool_call>{"name": "f", "arguments": {}}',
    '<tool_call>{"name": "f", "argu',
    '<tool_call>{"name": "f</tool_call> and no more',
]


def read(text: str, cuts: list[int] | None = None, before: str = "", calls: bool = True) -> AnswerReader:
    reader = AnswerReader(before, reads_calls=calls)
    cuts = [0, *(cuts or []), len(text)]
    parts = [part for a, b in itertools.pairwise(cuts) for part in reader.push(text[a:b])]
    parts += reader.finish()
    assert "".join(part.content for part in parts) == reader.content
    assert "".join(part.reasoning for part in parts) == reader.reasoning
    assert [part.call for part in parts if part.call] == reader.calls
    return reader


@pytest.mark.parametrize(
    ("text", "reasoning", "content", "calls"),
    [
        ("", "", "", []),
        ("yes", "", "yes", []),
        ("<think>\nso\n\n</think>\n\nyes", "so\n", "yes", []),
        ("<think>so</think>yes", "so", "yes", []),
        ("<think>\n\n</think>\n\nyes", "", "yes", []),
        ("<think>\nso</thi", "so</thi", "", []),
        ("<think>\nso\n</think>\n\n\n yes \n", "so", "\n yes \n", []),
        ("<thin", "", "<thin", []),
        ("yes <think>no</think>", "", "yes <think>no</think>", []),
        (CALL, "", "", [ADD]),
        (f"<think>\nso\n</think>\n\n{CALL}\n{OTHER}", "so", "", [ADD, ToolCall("f", "{}")]),
        (f"let me see\n\n{CALL}", "", "let me see\n", [ADD]),
        (f"{CALL}\n\n and then <tool", "", "\n\n and then <tool", [ADD]),
        (MARK_INSIDE, "", "", [ToolCall("say", '{"text": "a </tool_call> \\" </tool_call>"}')]),
        ('<tool_call>{"arguments": {"x": 1}, "name": "f"}</tool_call>', "", "", [ToolCall("f", '{"x": 1}')]),
        *((broken, "", broken, []) for broken in BROKEN),
        (f"see\n{BROKEN[0]}\n{OTHER}\n", "", f"see\n{BROKEN[0]}", [ToolCall("f", "{}")]),
        (f"{OTHER}\n{BROKEN[0]}", "", f"\n{BROKEN[0]}", [ToolCall("f", "{}")]),
    ],
)
def test_the_parts_of_an_answer_wherever_it_is_cut(text, reasoning, content, calls):
    draw = random.Random(text)
    every_character = list(range(len(text))) if len(text) < 1000 else []
    some = [sorted(draw.choices(range(len(text) + 1), k=draw.randint(1, 6))) for _ in range(100)]
    for cuts in [[], every_character, *some]:
        reader = read(text, cuts)
        assert (reader.reasoning, reader.content, reader.calls) == (reasoning, content, calls)


def test_random_texts_are_the_same_wherever_they_are_cut():
    draw = random.Random(0)
    words = ["<think>", "</think>", "<tool_call>", "</tool_call>", "\n", " ", "a", "<", '"', "{", "}", CALL, OTHER]
    for _ in range(500):
        text = "".join(draw.choices(words, k=draw.randint(1, 8)))
        whole = read(text)
        for _ in range(5):
            cut = read(text, sorted(draw.choices(range(len(text) + 1), k=draw.randint(1, 6))))
            assert cut.message() == whole.message(), text


def test_what_is_certain_is_given_at_once():
    reader = AnswerReader(reads_calls=True)
    assert reader.push("<think>\nso it") == [("", "so it", None)]
    assert reader.push(" is\n</") == [("", " is", None)] and reader.push("think>\n\n") == []
    assert reader.push("yes <") == [("yes ", "", None)] and reader.push("b>") == [("<b>", "", None)]


def test_thinking_that_the_template_has_opened():
    for before in ("assistant\n<think>\n", "assistant\n<think>"):
        reader = read("\nso\n</think>\n\nyes", before=before)
        assert (reader.reasoning, reader.content) == ("so" if before.endswith(">") else "\nso", "yes")
    assert read("yes", before="assistant\n<think>\n\n</think>\n\n").content == "yes"


def test_without_tools_a_call_is_content():
    reader = read(CALL, calls=False)
    assert reader.content == CALL and reader.name_end("stop") == "stop"


def test_the_answer_as_a_message():
    reader = read(f"<think>\nso\n</think>\n\nyes\n{CALL}")
    function = {"name": "add", "arguments": ADD.arguments}
    assert reader.message() == {
        "role": "assistant",
        "content": "yes",
        "reasoning_content": "so",
        "tool_calls": [{"type": "function", "function": function}],
    }
    assert json.loads(function["arguments"]) == {"a": 1, "b": [2, "加"]}
    assert (reader.name_end("stop"), reader.name_end("length"), reader.name_end(None)) == ("tool_calls", "length", None)


# In the manner of Qwen and MiniMind: a prompt opens the thinking or leaves it out, and there are no generation blocks.
QWEN = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{% if m.role == 'assistant' %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '\n' if m.content or not loop.first else '' }}"
    '<tool_call>\n{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments if c.function.arguments is string else c.function.arguments | tojson }}}\n</tool_call>"
    "{% endfor %}<|im_end|>\n{% endfor %}{% if tools and add_generation_prompt is not defined %}tools{% endif %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n"
    "{% if not open_thinking %}{{ '\n</think>\n\n' }}{% endif %}{% endif %}"
)
TOOLS = [{"type": "function", "function": {"name": "f"}}]


def random_answer(draw: random.Random) -> dict[str, Any]:
    words = ["- one", "(x", "fox", "你好", "\n", " ", "<b>", '"', "\\", "</", "\n\n"]

    def some_text() -> str:
        return "".join(draw.choices(words, k=draw.randint(0, 5)))

    answer: dict[str, Any] = {"role": "assistant", "content": some_text()}
    if draw.random() < 0.5:
        answer["reasoning_content"] = "so" + some_text()
    if draw.random() < 0.5:
        calls = [{"name": "f", "arguments": {some_text(): [some_text(), 1.5]}} for _ in range(draw.randint(1, 3))]
        answer["tool_calls"] = [{"type": "function", "function": call} for call in calls]
    return answer


@pytest.mark.parametrize("text", [default_template(), QWEN], ids=["default", "qwen"])
@pytest.mark.parametrize("save", [save_sentencepiece, save_byte_level])
def test_a_history_has_the_ids_that_were_generated(save, text, tmp_path):
    """Ids to text, to its parts, to the template's ids again: nothing is lost or added, a line break least of all."""
    template = ChatTemplate(text, load_tokenizer(save(tmp_path)))
    decode, draw = template.tokenizer.decode, random.Random(0)
    turns: list[dict[str, Any]] = []
    for number in range(100):
        turns = [*turns, {"role": "user", "content": "- so"}] if number % 3 else [{"role": "user", "content": "first"}]
        answer = random_answer(draw)
        thinks = "reasoning_content" in answer and (text == QWEN or draw.random() < 0.5)
        prompt = template.encode_prompt(turns, TOOLS, thinking=thinks)
        trained = template.encode([*turns, answer], TOOLS).token_ids
        assert trained[: len(prompt)] == prompt
        generated = trained[len(prompt) : trained.index(template.closing_id, len(prompt))]
        turns.append(read_message(template.tokenizer, prompt, TOOLS, decode(prompt + generated)[len(decode(prompt)) :]))
        history = template.encode_prompt(turns, TOOLS)
        assert history[: len(prompt) + len(generated) + 1] == [*prompt, *generated, template.closing_id]
