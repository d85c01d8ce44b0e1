"""Learning from rewards: the papers' formulas, gradients of a plain loop, any ranks and stage, a stop, bad rewards."""

import http.server
import json
import math
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import pytest
import torch
from pytest import approx
from tokenizers_for_tests import save_byte_level
from training_runs import EXPERTS, MODEL, RankPool, flags_for, losses, rank_pool, read_metrics, train, weights

from data_prep.tokenize_chat import TokenizeChatFlags
from data_prep.tokenize_corpus import prepare
from data_prep.writing.encode_chat import ChatOptions
from minimind.checkpoints.folder import list_checkpoints
from minimind.config.run_config import TrainConfig
from minimind.data.chat_template import load_chat_template
from minimind.data.dataset import load_shards, open_dataset
from minimind.data.loader import collate
from minimind.data.shards import open_split
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.inference.decoding import TokenLogprobs
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.training.objectives.grpo import (
    LOSSES,
    SAMPLES_NAME,
    GroupRelative,
    group_advantages,
    kl_estimate,
)
from minimind.training.rewards.environments import Calculator
from minimind.training.rewards.ready import Answer, exact, judge, length, number, thinking
from minimind.training.rewards.rollout import Question, Rollout, encode_observation, find_questions

VOCAB = 400
LOG_PROBS, SAMPLED = (-1.0, -0.5, -3.0, -2.0, -1.5), (-1.1, -1.0, -2.5, -2.01, -0.9)
ADVANTAGES = (1.5, 0.7, 1.2, -0.4, -2.0)  # the second token has risen too far, the last has fallen too far


def paper_clip(log_prob: float, sampled: float, advantage: float) -> float:
    ratio = math.exp(log_prob) / math.exp(sampled)
    return -min(ratio * advantage, min(max(ratio, 0.8), 1.28) * advantage)


def paper_cispo(log_prob: float, sampled: float, advantage: float, weigh_at: float | None = None) -> float:
    """`weigh_at`: where the weight, which has no gradient, is taken."""
    ratio = math.exp((log_prob if weigh_at is None else weigh_at) - sampled)
    return -min(max(ratio, 0.8), 1.28) * advantage * log_prob


@pytest.mark.parametrize("name", ["clip", "cispo"])
def test_losses_of_tokens_and_their_derivatives_are_those_of_the_papers(name: str) -> None:
    settings = TrainConfig(clip_low=0.2, clip_high=0.28)
    rows = [torch.tensor(row, dtype=torch.float64) for row in (LOG_PROBS, SAMPLED, ADVANTAGES)]
    rows[0].requires_grad_()
    found = LOSSES[name](*rows, settings)
    (slopes,) = torch.autograd.grad(found.sum(), rows[0])
    for place, (log_prob, sampled, advantage) in enumerate(zip(LOG_PROBS, SAMPLED, ADVANTAGES, strict=True)):
        if name == "clip":
            value, up, down = (paper_clip(log_prob + step, sampled, advantage) for step in (0, 1e-6, -1e-6))
        else:
            value = paper_cispo(log_prob, sampled, advantage)
            up, down = (paper_cispo(log_prob + step, sampled, advantage, log_prob) for step in (1e-6, -1e-6))
        assert found[place].item() == approx(value, rel=1e-6)
        assert slopes[place].item() == approx((up - down) / 2e-6, rel=1e-5, abs=1e-8)
    assert (slopes == 0).tolist() == [False, name == "clip", False, False, name == "clip"]


def test_advantages_and_the_divergence() -> None:
    rewards = torch.tensor([[1.0, 0.0, 0.0, 1.0], [2.0, 2.0, 2.0, 2.0], [0.0, 0.0, 0.0, 3.0]])
    found = group_advantages(rewards, TrainConfig())
    deviation = math.sqrt(4 * 0.25 / 3)
    assert found[0].tolist() == approx([0.5 / (deviation + 1e-4), *[-0.5 / (deviation + 1e-4)] * 2, 0.8659], rel=1e-4)
    assert found[1].tolist() == [0.0] * 4
    assert group_advantages(rewards, TrainConfig(advantage_scale="none"))[2].tolist() == [-0.75, -0.75, -0.75, 2.25]
    # The estimate is KL(model || reference) on average over what the model draws.
    model, reference = torch.tensor([0.7, 0.2, 0.1]), torch.tensor([0.5, 0.25, 0.25])
    estimate = (model * kl_estimate(model.log(), reference.log())).sum()
    assert estimate.item() == approx((model * (model / reference).log()).sum().item(), rel=1e-5)


def make_shards(folder: Path, records: list[dict[str, Any]]) -> Path:
    tokenizer = save_byte_level(folder / "tokenizer")
    source = folder / "questions.jsonl"
    source.write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {"input": (str(source),), "tokenizer": tokenizer, "output": folder / "shards", "val_fraction": 0.1}
    prepare(TokenizeChatFlags(**names, val_input=(), workers=1), ChatOptions)
    return folder / "shards"


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    sums = [
        {"messages": [{"role": "user", "content": f"{a}+{b}"}, {"role": "assistant", "content": str(a + b)}]}
        for a in range(9)
        for b in range(4)
    ]
    return make_shards(tmp_path_factory.mktemp("questions"), sums)


def test_a_question_is_all_before_the_last_answer(tmp_path: Path) -> None:
    turns = [("user", "a?"), ("assistant", "b"), ("user", "c?"), ("assistant", "d e")]
    messages = [{"role": role, "content": content} for role, content in turns]
    folder = make_shards(tmp_path, [{"messages": messages}] * 4)
    reader = open_split(folder, "train")
    dataset = open_dataset(reader, 64, alone=True)
    tokenizer = load_tokenizer(next((folder / "train").glob("tokenizer*")))
    (question,) = find_questions(collate([dataset[0]], [7]))
    assert question.token_ids == load_chat_template(tokenizer).encode_prompt(messages[:-1])
    row = Rollout(question, tokenizer, 4, temperature=1.0)
    assert (row.answer().expected, question.position) == ("d e", 7)


def make_rollouts(tokenizer: Any) -> list[Rollout]:
    """Two groups of three answers of different lengths, drawn by another model than the one that is trained; one of
    them in two turns, with what a tool has said between."""
    draw = torch.Generator().manual_seed(1)
    rows = []
    for number_of, size in enumerate((3, 1, 4, 2, 5, 4)):
        question = Question([5 + number_of // 3, 9, 11][: 2 + number_of // 3], [4], number_of // 3)
        row = Rollout(question, tokenizer, 8, temperature=1.0)
        add_draws(row, size, draw)
        if number_of == 2:
            longer = question._replace(token_ids=[*row.token_ids, 7, 8])
            row = Rollout(longer, tokenizer, 8, temperature=1.0, earlier=row)
            add_draws(row, 2, draw)
        row.reward = float(number_of % 2 + number_of / 10)
        rows.append(row)
    return rows


def add_draws(row: Rollout, count: int, draw: torch.Generator) -> None:
    for _ in range(count):
        token = int(torch.randint(VOCAB, (), generator=draw))
        row.logprobs.append(TokenLogprobs(token, -6 + float(torch.randn((), generator=draw)), []))


def log_probs_of(model: MiniMindForCausalLM, row: Rollout) -> torch.Tensor:
    """Of the tokens that were drawn, each turn by itself."""
    found = []
    for turn in row.turns:
        ids, first = torch.tensor([turn.token_ids]), len(turn.question.token_ids)
        found.append(model(ids).logits[0, first - 1 : -1].log_softmax(-1).gather(1, ids[0, first:, None])[:, 0])
    return torch.cat(found)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"loss_average": "token", "clip_high": 0.28, "kl_coef": 0.3},
        {"loss_average": "constant", "advantage_scale": "none", "max_new_tokens": 8},
        {"loss_average": "token", "policy_loss": "cispo"},
    ],
)
def test_gradients_are_those_of_a_plain_loop(shards: Path, options: dict[str, Any]) -> None:
    """Answers packed into windows, weights from the derivative; against every answer alone and autograd."""
    torch.manual_seed(0)
    config = ModelConfig(**{**MODEL, "vocab_size": VOCAB, "initializer_range": 0.3, "z_loss_coef": 0.01})
    model = MiniMindForCausalLM(config)
    start = MiniMindForCausalLM(config).requires_grad_(False) if "kl_coef" in options else None
    tokenizer = load_tokenizer(next((shards / "train").glob("tokenizer*")))
    settings = TrainConfig(reward=("exact",), group_size=3, **options)
    resolved: Any = SimpleNamespace(train=settings, data=SimpleNamespace(seq_len=16), model=config)
    objective, rows = GroupRelative(resolved, tokenizer, None, start), make_rollouts(tokenizer)  # type: ignore[arg-type]
    batch = objective._make_batch([rows[:3], rows[3:]])
    objective._totals = (6, 21)
    assert len(batch.input_ids) < 6, "the answers are not packed"
    parts = objective.loss(model, batch)
    (parts.loss / objective.count_targets([batch])).backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()

    total = torch.zeros(())
    for group in (rows[:3], rows[3:]):
        rewards = torch.tensor([row.reward for row in group])
        for row, reward in zip(group, rewards, strict=True):
            advantage = reward - rewards.mean()
            if settings.advantage_scale == "std":
                advantage = advantage / (rewards.std() + 1e-4)
            own, before = (log_probs_of(one, row) for one in (model, start or model))
            sampled = torch.tensor([logprob.logprob for turn in row.turns for logprob in turn.logprobs])
            ratio = (own - sampled).exp()
            clipped = ratio.clamp(1 - settings.clip_low, 1 + settings.clip_high)
            if settings.policy_loss == "cispo":
                each = -clipped.detach() * advantage * own
            else:
                each = -torch.minimum(ratio * advantage, clipped * advantage)
            if start is not None:
                each = each + settings.kl_coef * ((before - own).exp() - (before - own) - 1)
            total = (
                total
                + {"answer": each.mean() / 6, "token": each.sum() / 21, "constant": each.sum() / (6 * 8)}[
                    settings.loss_average
                ]
            )
    total.backward()
    assert parts.loss.item() / objective.count_targets([batch]) == approx(total.item(), rel=1e-5, abs=1e-6)
    for key, parameter in model.named_parameters():
        scale = float(parameter.grad.abs().max())
        torch.testing.assert_close(ours[key], parameter.grad, rtol=1e-4, atol=1e-5 * scale)
    objective.close()


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def start(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model that answers with numbers, right by chance."""
    run_dir = tmp_path_factory.mktemp("start") / "run"
    sizes = {"vocab_size": VOCAB, "hidden_size": 32, "seq_len": 64, "micro_batch_size": 4}
    train(flags_for(shards, run_dir, **sizes, lr=1e-2, steps=60, save_every=0))
    return run_dir


def flags(shards: Path, run_dir: Path, start: Path, **others: object) -> list[str]:
    own = {"objective": "grpo", "reward": "number", "group_size": 4, "max_new_tokens": 5, "init_from": start}
    return flags_for(
        shards, run_dir, **{"vocab_size": VOCAB, "hidden_size": 32, "seq_len": 64, "lr": 3e-3, **own, **others}
    )


@pytest.fixture(scope="module")
def plain(shards: Path, start: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    train(flags(shards, run_dir, start, kl_coef=0.1, rollout_steps=3))
    return run_dir


def test_the_sampler_is_the_model_that_is_trained(plain: Path) -> None:
    steps = [record for record in read_metrics(plain) if "loss" in record]
    assert steps[0]["ratio"] == approx(1, abs=1e-3) and steps[0]["log_prob_gap"] < 1e-4
    assert steps[0]["kl"] == approx(0, abs=1e-5)
    assert any(record["reward_std"] > 0 for record in steps)
    assert steps[3]["log_prob_gap"] < 1e-4 < steps[4]["log_prob_gap"], "the fourth step begins a rollout"
    samples = [json.loads(line) for line in (plain / SAMPLES_NAME).read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [1, 2, 3, 4, 5, 6]
    assert all(len(sample["answers"]) == 4 for sample in samples)


@pytest.mark.parametrize("stage", [2, 3])
def test_two_ranks_of_another_stage_give_the_same_losses(
    pool: RankPool, plain: Path, start: Path, shards: Path, tmp_path: Path, stage: int
) -> None:
    pool.run(train, flags(shards, tmp_path, start, stage=stage, kl_coef=0.1, rollout_steps=3))
    assert list(losses(tmp_path).values()) == approx(list(losses(plain).values()), abs=1e-4)
    theirs, ours = ([record["reward"] for record in read_metrics(run) if "loss" in record] for run in (plain, tmp_path))
    assert ours == approx(theirs)


def test_a_resumed_run_is_the_uninterrupted_one(plain: Path, start: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    train(flags(shards, tmp_path / "run", start, kl_coef=0.1, rollout_steps=3))  # in the midst of a rollout
    assert losses(tmp_path / "run") == losses(plain)
    assert (tmp_path / "run" / SAMPLES_NAME).read_text() == (plain / SAMPLES_NAME).read_text()
    there, here = weights(plain), weights(tmp_path / "run")
    assert all(torch.equal(here[name], there[name]) for name in there)
    with pytest.raises(UserError, match=r"group_size 4 there, 6 here"):
        train(flags(shards, tmp_path / "run", start, kl_coef=0.1, rollout_steps=3, group_size=6))


def test_experts_on_other_ranks_take_part_in_the_rollouts(pool: RankPool, shards: Path, tmp_path: Path) -> None:
    """Each of two ranks holds half of the experts; the sampler has them all."""
    given = {"objective": "grpo", "reward": "length", "group_size": 4, "max_new_tokens": 5, "steps": 2}
    given |= {**EXPERTS, "vocab_size": VOCAB, "seq_len": 64, "lr": 3e-3, "ep_size": 2, "stage": 2}
    pool.run(train, flags_for(shards, tmp_path, **given))
    steps = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert steps[0]["ratio"] == approx(1, abs=1e-3) and steps[1]["log_prob_gap"] < 1e-4


def test_adapters_take_part_in_the_rollouts(shards: Path, start: Path, tmp_path: Path) -> None:
    train(flags(shards, tmp_path, start, lora_rank=2, stage=3, lr=0.1, steps=2))
    steps = [record for record in read_metrics(tmp_path) if "loss" in record]
    assert steps[0]["log_prob_gap"] < 1e-4 and steps[1]["log_prob_gap"] < 1e-4


def test_ready_rewards() -> None:
    answer = Answer("What is 2 plus 2?", " 4", "4", 2, True)
    assert exact(answer) == number(answer) == 1
    assert exact(answer._replace(text="It is 4.")) == 0 and number(answer._replace(text="It is 4.")) == 1
    assert number(answer._replace(text="none")) == 0 and number(answer._replace(expected="1,004", text="1004")) == 1
    assert thinking(answer._replace(text="<think>2 and 2</think>\n4")) == 1
    assert thinking(answer._replace(prompt="...<think>\n", text="2 and 2</think>\n4")) == 1
    assert [thinking(answer._replace(text=text)) for text in ("4", "<think>2", "<think></think>")] == [0, 0, 0]
    assert length(answer._replace(text="4444")) == 0.25 and length(answer._replace(is_finished=False)) == 0


class FakeJudge(http.server.BaseHTTPRequestHandler):
    grade = "I give it 7."
    asked: ClassVar[list[dict[str, Any]]] = []

    def do_POST(self) -> None:
        self.asked.append(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"choices": [{"message": {"content": self.grade}}]}).encode())

    def log_message(self, *_: Any) -> None:
        pass


def test_a_judge_is_asked_over_http(monkeypatch: pytest.MonkeyPatch) -> None:
    answer = Answer("What is 2 plus 2?", "five", "4", 2, True)
    with http.server.HTTPServer(("127.0.0.1", 0), FakeJudge) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("MINIMIND_JUDGE_URL", f"http://127.0.0.1:{server.server_port}/v1/")
        monkeypatch.setenv("MINIMIND_JUDGE_MODEL", "large")
        assert judge(answer) == 0.7
        monkeypatch.setattr(FakeJudge, "grade", "no idea")
        with pytest.raises(ValueError, match="the judge gave no grade from 0 to 10: 'no idea'"):
            judge(answer)
        server.shutdown()
    asked = FakeJudge.asked[0]
    assert asked["model"] == "large"
    assert all(text in asked["messages"][0]["content"] for text in ("What is 2 plus 2?", "five", "4"))


def test_calculator() -> None:
    def ask(expression: str) -> str | None:
        call = json.dumps({"name": "calculator", "arguments": {"expression": expression}})
        return Calculator().step(f"Let me see.\n<tool_call>\n{call}\n</tool_call>")

    assert [ask("2 * (3 + 4)"), ask("-7 / 2"), ask("1/0")] == ["14", "-3.5", "error: ZeroDivisionError"]
    assert [ask("2 ** 9"), ask("open('x')"), ask("(" * 5)] == ["error: ValueError"] * 2 + ["error: SyntaxError"]
    assert Calculator().step("<tool_call>12</tool_call>") == "error: TypeError"
    assert Calculator().step("It is 14.") is None


def test_what_a_tool_says_stands_between_answers_as_in_a_history(shards: Path) -> None:
    tokenizer = load_tokenizer(next((shards / "train").glob("tokenizer*")))
    template, question = load_chat_template(tokenizer), {"role": "user", "content": "1+2"}
    answer, tool = {"role": "assistant", "content": "wait"}, {"role": "tool", "content": "3\n-4"}
    begun, closed = template.encode_prompt([question]), tokenizer.encode("wait<|im_end|>")
    expected = template.encode_prompt([question, answer, tool])
    assert [*begun, *closed, *encode_observation(tokenizer, "3\n-4")] == expected


def test_turns_with_an_environment_are_trained_without_what_it_says(
    shards: Path, start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "patient.py").write_text(PATIENT)
    monkeypatch.syspath_prepend(tmp_path)
    given = {"environment": "patient:Patient", "reward": "patient:shown", "max_new_tokens": 3, "steps": 2}
    train(flags(shards, tmp_path / "run", start, **given))
    steps = [record for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps[0]["ratio"] == approx(1, abs=1e-3) and steps[0]["log_prob_gap"] < 1e-4
    # The reward is the number of times that the environment has spoken: not to an answer that was cut.
    samples = [json.loads(line) for line in (tmp_path / "run" / SAMPLES_NAME).read_text().splitlines()]
    rewards = [answer["reward"] for sample in samples for answer in sample["answers"]]
    assert 1 <= max(rewards) <= 2 and steps[0]["answer_length"] > 3
    with pytest.raises(UserError, match=r"reward: patient:Nobody cannot be imported: AttributeError"):
        train(flags(shards, tmp_path / "other", start, **{**given, "environment": "patient:Nobody"}))


PATIENT = """
class Patient:
    def reset(self, prompt): self.prompt, self.count = prompt, 0
    def step(self, text):
        assert self.prompt.startswith("<|im_start|>user")
        self.count += 1
        return "again" if self.count < 3 else None
def shown(answer): return answer.prompt.count("<|im_start|>tool\\nagain<|im_end|>")
"""


BAD = """
import time
calls = 0
def raises(answer): raise ValueError("no such answer")
def hangs(answer): time.sleep(600)
def nan(answer): return float("nan")
def dies(answer): __import__("os")._exit(3)
def sometimes(answer):
    global calls
    calls += 1
    print("a reward may print")
    if calls == 2: raise ValueError("the second time")
    return len(answer.text)
"""


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "bad_rewards.py").write_text(BAD)
    monkeypatch.syspath_prepend(tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("raises", r"step 1: reward bad_rewards:raises raised ValueError: no such answer \(answer "),
        ("hangs", r"bad_rewards:hangs took longer than 0.5 s"),
        ("nan", r"bad_rewards:nan gave nan"),
        ("dies", r"bad_rewards:dies: the process ended with code 3"),
    ],
)
@pytest.mark.usefixtures("bad")
def test_a_bad_reward_ends_the_run_in_one_line(
    shards: Path, start: Path, tmp_path: Path, name: str, message: str
) -> None:
    one = {"global_batch_size": 1, "group_size": 2, "reward_seconds": 0.5, "reward_workers": 1}
    with pytest.raises(UserError, match=message) as error:
        train(flags(shards, tmp_path / "run", start, reward=f"bad_rewards:{name}", **one))
    assert "\n" not in str(error.value) and "--skip-bad-rewards N" in str(error.value)


@pytest.mark.usefixtures("bad")
def test_nothing_is_lost_when_a_reward_fails(shards: Path, start: Path, tmp_path: Path) -> None:
    """The second answer of the first step: left out with its group where that is allowed; the next to fail ends the
    run with its steps saved, and the same command goes on."""
    given = {"reward": "bad_rewards:sometimes", "reward_workers": 1, "steps": 3, "save_every": 0}
    code, printed = train(flags(shards, tmp_path / "run", start, **given, skip_bad_rewards=1))
    assert code == 0 and "step 1: reward bad_rewards:sometimes raised ValueError: the second time" in printed
    late = (tmp_path / "bad_rewards.py").read_text().replace("calls == 2", "calls == 20")
    (tmp_path / "late_rewards.py").write_text(late)
    given["reward"] = "late_rewards:sometimes"
    with pytest.raises(UserError, match="step 2: reward late_rewards:sometimes"):
        train(flags(shards, tmp_path / "late", start, **given))
    assert [folder.name for folder in list_checkpoints(tmp_path / "late")] == ["step_00000001"]
    assert list(losses(tmp_path / "late")) == [1]
    assert train(flags(shards, tmp_path / "late", start, **given, skip_bad_rewards=1))[0] == 0
    assert list(losses(tmp_path / "late")) == [1, 2, 3]


def test_what_cannot_be_is_refused_before_the_run(shards: Path, start: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    for given, message in (
        ({"reward": "exactly"}, r"reward: exactly cannot be imported: AttributeError.*; give module:name"),
        ({"reward": "nowhere:f"}, r"reward: nowhere:f cannot be imported: ModuleNotFoundError"),
        ({"reward_weights": (1, 2)}, r"reward_weights: 2 weights for 1 rewards; give one for each"),
        ({"objective": "pretrain"}, r"reward: number; --objective grpo and --reward NAME are given together"),
        ({"seq_len": 8}, r"no conversation fits a window of seq_len 8"),
    ):
        with pytest.raises(UserError, match=message):
            train(flags(shards, run, start, **given))
    with pytest.raises(UserError, match=r"kl_coef: 0.1 is the divergence from a trained model; give it by --init-from"):
        train([flag for flag in flags(shards, run, start, kl_coef=0.1) if flag not in ("--init-from", str(start))])
    with pytest.raises(UserError, match=r"objective: grpo learns from questions in conversations"):
        train(flags(tiny_corpus, run, start))
    assert not run.exists()
    assert load_shards(shards, seq_len=64)
