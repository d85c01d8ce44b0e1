"""Multiple-choice accuracy: against the plain sum of log-probabilities, and against the real lm-evaluation-harness."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import save_sentencepiece

from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.evaluate import main as evaluate_main
from minimind.export import main as export_main
from minimind.inference.likelihood import encode_pair, log_likelihood
from minimind.inference.multiple_choice import Question, read_questions, score_choices
from minimind.model import PRESETS, MiniMindForCausalLM

WORDS = ["the", "quick", "brown", "fox", "jumps", "over", "the", "lazy", "dog", "你好", "世界", "def", "return", "x"]


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tokenizer = load_tokenizer(save_sentencepiece(folder))
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    MiniMindForCausalLM(config).save_pretrained(folder)
    return folder


def questions(count: int = 60) -> list[Question]:
    generator = torch.Generator().manual_seed(0)

    def words(low: int, high: int) -> str:
        length = int(torch.randint(low, high, (1,), generator=generator))
        return " ".join(WORDS[i] for i in torch.randint(0, len(WORDS), (length,), generator=generator).tolist())

    return [Question(words(3, 12), tuple(words(1, 6) for _ in range(4)), number % 4) for number in range(count)]


def write(file: Path, some: list[Question]) -> Path:
    file.write_text("".join(json.dumps(dataclasses.asdict(one)) + "\n" for one in some), encoding="utf-8")
    return file


@torch.no_grad()
def test_a_continuation_has_the_probability_of_its_tokens(exported):
    model, tokenizer = MiniMindForCausalLM.from_pretrained(exported), load_tokenizer(exported)
    context, continuation = encode_pair(tokenizer, "the quick ", " brown fox")
    assert context == tokenizer.encode("the quick") and context + continuation == tokenizer.encode(
        "the quick  brown fox"
    )
    total, ids = 0.0, list(context)
    for token in continuation:
        total += float(model(torch.tensor([ids])).logits[0, -1].double().log_softmax(-1)[token])
        ids.append(token)
    assert log_likelihood(model, context, continuation) == pytest.approx(total, rel=1e-5)
    longer = [5] * 600  # beyond the model's positions: the end counts
    assert log_likelihood(model, longer, continuation) == log_likelihood(model, longer[:511], continuation)


def test_the_share_of_right_answers(exported):
    model, tokenizer = MiniMindForCausalLM.from_pretrained(exported), load_tokenizer(exported)
    right, right_norm, some = 0, 0, questions()
    for one in some:
        values = [log_likelihood(model, *encode_pair(tokenizer, one.context, " " + choice)) for choice in one.choices]
        right += values.index(max(values)) == one.answer
        normed = [value / len(choice) for value, choice in zip(values, one.choices, strict=True)]
        right_norm += normed.index(max(normed)) == one.answer
    score = score_choices(model, tokenizer, some)
    assert (score.accuracy, score.accuracy_norm) == pytest.approx((right / 60, right_norm / 60))
    # Where the longest choice is always the right one, dividing by the length decides.
    longest = [dataclasses.replace(one, answer=max(range(4), key=lambda n: len(one.choices[n]))) for one in some]
    score = score_choices(model, tokenizer, longest)
    assert score.accuracy_norm > score.accuracy


def test_the_real_harness_gives_our_figures(exported, tmp_path, capsys):
    """EleutherAI's lm-evaluation-harness on an export through transformers, and our command on the same file."""
    lm_eval = pytest.importorskip("lm_eval")
    from lm_eval.tasks import TaskManager

    file = write(tmp_path / "questions.jsonl", questions())
    export_main(["--checkpoint", str(exported), "--output", str(tmp_path / "hf")])
    task = {
        "task": "local_questions",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{context}}",
        "doc_to_choice": "{{choices}}",
        "doc_to_target": "{{answer}}",
        "metric_list": [
            {"metric": name, "aggregation": "mean", "higher_is_better": True} for name in ("acc", "acc_norm")
        ],
    }
    found = lm_eval.simple_evaluate(
        model="hf",
        model_args=f"pretrained={tmp_path / 'hf'},dtype=float32",
        tasks=[task],
        task_manager=TaskManager(include_defaults=False),
        device="cpu",
        batch_size=4,
        bootstrap_iters=0,
    )["results"]["local_questions"]
    evaluate_main(["--checkpoint", str(exported), "--multiple-choice", str(file), "--device", "cpu",
                   "--output", str(tmp_path / "out.json")])  # fmt: skip
    ours = json.loads((tmp_path / "out.json").read_text())
    assert ours["accuracy"] == pytest.approx(found["acc,none"]) and ours["num_questions"] == 60
    assert ours["accuracy_norm"] == pytest.approx(found["acc_norm,none"])
    assert f"length-normed   {ours['accuracy_norm']:.4f}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "line 2: "),
        ('{"context": "x", "choices": ["a", "b"]}', "'answer' is missing"),
        ('{"context": "x", "choices": ["a", "b"], "answer": 2}', "answer 2 is not the index of a choice"),
        ('{"context": "x", "choices": ["a", "b"], "answer": "a"}', "answer 'a' is not"),
        ('{"context": "x", "choices": ["a"], "answer": 0}', "at least two choices"),
        ('{"context": 1, "choices": ["a", "b"], "answer": 0}', "must be non-empty texts"),
        ("[]", "line 2: "),
    ],
)
def test_a_wrong_line_is_named(line, said, tmp_path):
    file = write(tmp_path / "questions.jsonl", questions(1))
    file.write_text(file.read_text() + line + "\n")
    with pytest.raises(UserError, match=said):
        read_questions(file)
    file.write_text("\n")
    with pytest.raises(UserError, match="holds no question"):
        read_questions(file)
