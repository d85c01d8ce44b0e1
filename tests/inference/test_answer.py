"""A file of questions answered: each as alone, in order, whatever interrupts."""

import dataclasses
import json
import os
import signal
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import save_byte_level

from minimind import errors
from minimind.answer import main
from minimind.checkpoints.formats.load_model import load_model
from minimind.data.chat_template import load_chat_template
from minimind.data.tokenizer import load_tokenizer
from minimind.inference.answer_file import AnswerFile
from minimind.inference.generation import complete
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM

USER = {"role": "user", "content": "the fox"}
RECORDS = [
    {"prompt": "the fox", "answer": "nothing", "id": 7},
    {"messages": [USER, {"role": "assistant", "content": "yes"}]},
    {"conversations": [{"from": "human", "value": "你好"}, {"from": "gpt", "value": "好"}], "note": "\ud800"},
    {"instruction": "a lazy dog", "output": "x"},
    {"prompt": "def f(x):" * 20, "system": "be brief"},
    {"messages": [USER], "tools": [{"type": "function", "function": {"name": "f"}}]},
    {"prompt": "x"},
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """An export of a random model that says something else of every prompt, and a file of questions."""
    folder = tmp_path_factory.mktemp("answers")
    tokenizer = load_tokenizer(save_byte_level(folder / "model"))
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    MiniMindForCausalLM(config).save_pretrained(folder / "model")
    lines = [json.dumps(record) for record in RECORDS]
    (folder / "questions.jsonl").write_text("\n\n".join(lines))
    return folder


def answer(folder: Path, output: Path, *flags: str) -> bytes:
    named = ["--checkpoint", str(folder / "model"), "--input", str(folder / "questions.jsonl"), "--output", str(output)]
    main([*named, "--max-new-tokens", "12", "--device", "cpu", *flags])
    return output.read_bytes()


@pytest.fixture(scope="module")
def greedy(folder) -> bytes:
    return answer(folder, folder / "greedy.jsonl")


def test_each_is_answered_as_alone_and_in_order(folder, greedy):
    model, tokenizer = load_model(folder / "model")[0], load_tokenizer(folder / "model")
    turns = [USER], [USER], [{"role": "user", "content": "你好"}], [{"role": "user", "content": "a lazy dog"}]
    found = [json.loads(line) for line in greedy.splitlines()]
    for record, given in zip(RECORDS, found, strict=True):
        assert {name: given[name] for name in record} == record
    for turn, given in zip(turns, found, strict=False):
        prompt = load_chat_template(tokenizer).encode_prompt(turn)
        (alone,) = complete(model, tokenizer, [prompt], GenerationOptions(temperature=0.0, max_new_tokens=12))
        assert given["response"] == {"role": "assistant", "content": alone.text}
        assert given["finish_reason"] == alone.reason and given["num_tokens"] == len(alone.token_ids)
    assert found[5]["response"] != found[1]["response"]  # the tools are in the prompt
    assert sorted(path.name for path in folder.glob("greedy*")) == ["greedy.jsonl", "greedy.jsonl.settings.json"]


def test_answers_depend_neither_on_the_batch_nor_on_an_end(folder, tmp_path, monkeypatch):
    draw = ("--temperature", "0.9", "--seed", "5", "--max-batch-size")
    expected = answer(folder, tmp_path / "one.jsonl", *draw, "1")
    assert answer(folder, tmp_path / "three.jsonl", *draw, "3") == expected
    model, tokenizer = load_model(folder / "model")[0], load_tokenizer(folder / "model")
    prompt = load_chat_template(tokenizer).encode_prompt([USER])
    for line, given in zip((1, 3), expected.splitlines(), strict=False):  # one question, two draws
        (alone,) = complete(model, tokenizer, [prompt], GenerationOptions(0.9, max_new_tokens=12, seed=5 + line))
        assert json.loads(given)["response"]["content"] == alone.text

    output, journal = tmp_path / "ended.jsonl", tmp_path / "ended.jsonl.partial"
    add, kept = AnswerFile.add, []

    def add_and_end(answers, *what):
        add(answers, *what)
        kept.append(what)
        if len(kept) == 2:
            os.kill(os.getpid(), signal.SIGKILL)

    for times in (1, 2):
        if (child := os.fork()) == 0:
            monkeypatch.setattr(AnswerFile, "add", add_and_end)
            answer(folder, output, *draw, "2")
            os._exit(0)
        assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
        assert not output.exists() and journal.read_bytes().count(b"\n") == 2 * times
        with open(journal, "ab") as torn:
            torn.write(b'12\t{"half')
    monkeypatch.setattr(AnswerFile, "add", lambda answers, *what: (kept.append(what), add(answers, *what)))
    assert answer(folder, output, *draw, "3") == expected and len(kept) == len(RECORDS) - 4
    assert not journal.exists()


def test_the_same_command_again_has_nothing_to_do(folder, greedy, capsys, monkeypatch):
    monkeypatch.setattr(AnswerFile, "add", lambda *_: pytest.fail("answered again"))
    assert answer(folder, folder / "greedy.jsonl") == greedy
    assert "greedy.jsonl is complete: nothing to do" in capsys.readouterr().out


def test_exact_matches_are_counted(folder, tmp_path, greedy, capsys):
    texts = [json.loads(line)["response"]["content"] for line in greedy.splitlines()]
    rows = [
        {"prompt": "the fox", "answer": f" {texts[0]}\n"},
        {"prompt": "x", "answer": 5},
        {"messages": [USER], "answer": [{"role": "assistant", "content": texts[1]}]},
    ]
    (tmp_path / "model").symlink_to(folder / "model")
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for _ in range(2):
        answer(tmp_path, tmp_path / "out.jsonl", "--expect", "answer")
        assert capsys.readouterr().out.endswith("exact match: 2 of 3 (66.7%)\n")


@pytest.mark.parametrize(
    ("text", "flags", "said"),
    [
        ("", [], "questions.jsonl holds no question"),
        ('{"prompt": "a"}\n\n{"prompt": ', [], "questions.jsonl line 3: no JSON: Expecting value"),
        ('{"prompt": "a"}\n{"text": "a"}', [], "line 2: no conversation: neither messages"),
        ('{"messages": [{"role": "x"}]}', [], "line 1: message 1 has the role 'x'"),
        ('{"prompt": "a", "response": 1}', [], "line 1: has a field 'response'"),
        ('{"prompt": "a"}', ["--expect", "answer"], "line 1: field 'answer' is missing"),
        ('{"prompt": "a", "answer": {}}', ["--expect", "answer"], "line 1: field 'answer' is dict"),
        ('{"prompt": "a"}\n{"prompt": "%s"}' % ("x " * 600), [], "line 2: a question of"),
        ('{"prompt": "\\ud800"}', [], "line 1: text is not valid Unicode"),
        ('{"prompt": "a"}', ["--max-batch-size", "0"], "max_batch_size: 0 is not"),
        ('{"prompt": "a"}', ["--output", "/proc/none/out.jsonl"], "cannot write /proc/none"),
    ],
)
def test_what_cannot_be_answered_is_one_line_and_leaves_nothing(folder, tmp_path, capsys, text, flags, said):
    (tmp_path / "model").symlink_to(folder / "model")
    (tmp_path / "questions.jsonl").write_text(text)
    with pytest.raises(SystemExit) as caught:
        errors.run_main(lambda: answer(tmp_path, tmp_path / "out.jsonl", *flags))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == "" and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert not list(tmp_path.glob("out*"))


def test_answers_of_another_command_are_not_touched(folder, greedy, tmp_path):
    with pytest.raises(errors.UserError, match=r"was begun with temperature 0\.0, not 0\.5: give another --output"):
        answer(folder, folder / "greedy.jsonl", "--temperature", "0.5")
    (tmp_path / "mine.jsonl").write_text("mine")
    with pytest.raises(errors.UserError, match="exists and is not of this command"):
        answer(folder, tmp_path / "mine.jsonl")
    with AnswerFile(tmp_path / "other.jsonl", {}), pytest.raises(errors.UserError, match="by another process"):
        AnswerFile(tmp_path / "other.jsonl", {})
    assert (folder / "greedy.jsonl").read_bytes() == greedy and (tmp_path / "mine.jsonl").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["mine.jsonl"]
