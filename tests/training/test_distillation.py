"""Distillation: the formulas by autograd, a student that comes closer, any ranks and stage, a stop, wrong teachers."""

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from torch.utils._python_dispatch import TorchDispatchMode
from training_runs import EXPERTS, MODEL, RankPool, flags_for, losses, rank_pool, read_metrics, train, weights

from minimind.checkpoints.folder import list_checkpoints
from minimind.checkpoints.formats.frozen_model import FrozenModel
from minimind.config.run_config import TrainConfig
from minimind.data.dataset import load_shards, open_dataset
from minimind.data.loader import collate
from minimind.data.shards import open_split
from minimind.errors import UserError
from minimind.inference.evaluation import measure_loss
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.training.objectives.distillation import DIVERGENCES, Distillation, spread_rest


def objective_of(settings: TrainConfig, teacher: MiniMindForCausalLM) -> Distillation:
    """With a teacher in memory, whole."""
    frozen = FrozenModel.__new__(FrozenModel)
    frozen.model, frozen._body, frozen._is_partitioned = teacher.requires_grad_(False), teacher.model, False
    objective = Distillation(settings, lambda: frozen)
    objective._teacher = frozen
    return objective


@pytest.mark.parametrize("kl", ["forward", "reverse"])
@pytest.mark.parametrize("alpha", [0.0, 0.3])
def test_loss_and_gradients_are_those_of_the_formulas(tiny_corpus: Path, kl: str, alpha: float) -> None:
    """Of a student and a teacher of other sizes, with a document mask, in chunks; against whole logits and autograd."""
    torch.manual_seed(0)
    student = MiniMindForCausalLM(ModelConfig(**{**MODEL, "initializer_range": 0.3}))
    teacher = MiniMindForCausalLM(ModelConfig(**{**MODEL, "num_hidden_layers": 2, "initializer_range": 0.3}))
    type(student.lm_head).chunk_logits, before = 7 * 256, type(student.lm_head).chunk_logits
    dataset = load_shards(tiny_corpus, seq_len=16, document_mask=True)
    batch = collate([dataset[index] for index in range(3)], range(3))
    settings = TrainConfig(distill_alpha=alpha, distill_temperature=2.0, distill_kl=kl)  # type: ignore[arg-type]
    try:
        parts = objective_of(settings, teacher).loss(student, batch)
    finally:
        type(student.lm_head).chunk_logits = before
    parts.loss.backward()
    ours = {name: parameter.grad.clone() for name, parameter in student.named_parameters()}  # type: ignore[union-attr]
    student.zero_grad()
    inputs = {"position_ids": batch.position_ids, "cu_seqlens": batch.cu_seqlens}
    logits, teacher_logits = (model(batch.input_ids, **inputs).logits for model in (student, teacher))
    log_q, log_p = F.log_softmax(logits / 2, dim=-1), F.log_softmax(teacher_logits / 2, dim=-1)
    first, second = (log_p, log_q) if kl == "forward" else (log_q, log_p)
    divergence = (first.exp() * (first - second)).sum(-1)
    counted = batch.labels != -100
    hard = F.cross_entropy(logits[counted], batch.labels[counted], reduction="sum")
    expected = alpha * hard + (1 - alpha) * 4 * divergence[counted].sum()
    expected.backward()
    assert parts.loss.item() == approx(expected.item(), rel=1e-5)
    assert parts.figures["teacher_kl"].item() == approx(divergence[counted].sum().item(), rel=1e-5)
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(ours[name], parameter.grad, rtol=1e-4, atol=1e-5 * float(parameter.grad.abs().max()))


class Allocations(TorchDispatchMode):
    """The largest tensors made, each of (n, vocab_size)."""

    def __init__(self, vocab_size: int) -> None:
        super().__init__()
        self.vocab_size, self.rows, self.count = vocab_size, 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = func(*args, **(kwargs or {}))
        for tensor in made if isinstance(made, tuple | list) else (made,):
            if isinstance(tensor, torch.Tensor) and tensor.dim() > 1 and tensor.shape[-1] == self.vocab_size:
                self.count += 1
                self.rows = max(self.rows, tensor.numel() // self.vocab_size)
        return made


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_the_logits_of_a_batch_never_exist_as_a_whole(tiny_corpus: Path, kl: str, monkeypatch: Any) -> None:
    """Of neither model, in forward and backward: no tensor has more rows of scores than a chunk."""
    student, teacher = (MiniMindForCausalLM(ModelConfig(**MODEL)) for _ in range(2))
    monkeypatch.setattr(type(student.lm_head), "chunk_logits", 7 * 256)
    dataset = load_shards(tiny_corpus, seq_len=16)
    batch = collate([dataset[index] for index in range(3)], range(3))
    objective = objective_of(TrainConfig(distill_kl=kl), teacher)  # type: ignore[arg-type]
    with Allocations(256) as found:
        objective.loss(student, batch).loss.backward()
    assert found.count > 50, "it counts nothing"
    assert 7 <= found.rows < 48, found.rows


@pytest.mark.parametrize("kl", ["forward", "reverse"])
def test_stored_tokens_teach_the_divergence_of_them_and_of_the_rest_as_one(kl: str) -> None:
    torch.manual_seed(0)
    student = torch.randn(5, 30, dtype=torch.float64, requires_grad=True)
    log_p = F.log_softmax(torch.randn(5, 30, dtype=torch.float64), dim=-1)
    top = log_p.topk(4)
    log_q = F.log_softmax(student, dim=-1)
    coarse = [
        torch.cat([known, torch.log1p(-known.exp().sum(-1, keepdim=True))], dim=-1)
        for known in (top.values, log_q.gather(1, top.indices))
    ]
    first, second = coarse if kl == "forward" else coarse[::-1]
    expected = (first.exp() * (first - second)).sum(-1, keepdim=True)
    expected.sum().backward()
    with torch.no_grad():
        found = DIVERGENCES[kl](spread_rest(top.indices, top.values, log_q), log_q)
        whole = DIVERGENCES[kl](spread_rest(log_p.argsort(-1), log_p.sort(-1).values, log_q), log_q)
        everything = DIVERGENCES[kl](log_p, log_q)
    torch.testing.assert_close(found.values, expected.detach(), rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(found.gradient, student.grad, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(whole.values, everything.values)
    torch.testing.assert_close(whole.gradient, everything.gradient)


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def teacher(tiny_corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("teacher") / "run"
    train(flags_for(tiny_corpus, run_dir, num_hidden_layers=2, steps=12, lr=1e-2, save_every=0))
    return run_dir


def flags(corpus: Path, run_dir: Path, teacher: Path | None, **others: object) -> list[str]:
    given = {} if teacher is None else {"objective": "distill", "teacher": teacher, "distill_alpha": 0.2}
    return flags_for(corpus, run_dir, **{"lr": 1e-2, "eval_every": 6, **given, **others})


@pytest.fixture(scope="module")
def plain(tiny_corpus: Path, teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    train(flags(tiny_corpus, run_dir, teacher))
    return run_dir


def test_a_student_comes_closer_to_its_teacher(plain: Path, tiny_corpus: Path) -> None:
    records = read_metrics(plain)
    steps = [record for record in records if "loss" in record]
    assert steps[-1]["teacher_kl"] < 0.7 * steps[0]["teacher_kl"]
    assert 0 <= steps[-1]["teacher_agreement"] <= 1
    evaluation = next(record for record in records if "eval_loss" in record)
    assert evaluation["eval_teacher_kl"] > 0
    model = MiniMindForCausalLM.from_pretrained(plain)
    found = measure_loss(model, open_dataset(open_split(tiny_corpus, "val"), 16, keep_tail=True), torch.device("cpu"))
    assert evaluation["eval_loss"] == approx(found.loss, rel=1e-5), "that of the next token alone"


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_stage_and_ranks_give_the_same_losses(
    pool: RankPool, plain: Path, teacher: Path, tiny_corpus: Path, tmp_path: Path, ranks: int
) -> None:
    for stage, sp_size in ((1, 1), (2, 1), (3, 1), *(((1, 2), (3, 2)) if ranks == 2 else ())):
        run_dir = tmp_path / f"{stage}_{sp_size}"
        line = flags(tiny_corpus, run_dir, teacher, stage=stage, sp_size=sp_size, save_every=0)
        _, printed = train(line) if ranks == 1 else pool.run(train, line)[0]
        assert ("partitioned over the ranks" if stage == 3 else "whole on every rank") in printed
        assert list(losses(run_dir).values()) == approx(list(losses(plain).values()), rel=1e-4)


def test_a_teacher_with_experts_is_partitioned_too(pool: RankPool, tiny_corpus: Path, tmp_path: Path) -> None:
    """Which experts a rank uses depends on its tokens; the gathering must not."""
    train(flags_for(tiny_corpus, tmp_path / "teacher", steps=2, **EXPERTS))
    for stage in (1, 3):
        pool.run(train, flags(tiny_corpus, tmp_path / str(stage), tmp_path / "teacher", stage=stage, steps=3))
    assert list(losses(tmp_path / "3").values()) == approx(list(losses(tmp_path / "1").values()), rel=1e-4)


def test_a_teacher_in_8_bits_teaches_nearly_the_same(
    plain: Path, teacher: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    _, printed = train(flags(tiny_corpus, tmp_path, teacher, teacher_int8=True))
    assert "matrices in 8 bits" in printed
    assert list(losses(tmp_path).values()) == approx(list(losses(plain).values()), rel=0.02)
    assert losses(tmp_path) != losses(plain)


def test_a_resumed_run_is_the_uninterrupted_one(plain: Path, teacher: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    train(flags(tiny_corpus, tmp_path / "run", teacher))
    assert losses(tmp_path / "run") == losses(plain)
    there, here = weights(plain), weights(tmp_path / "run")
    assert all(torch.equal(here[name], there[name]) for name in there)
    with pytest.raises(UserError, match=r"distill_alpha 0.2 there, 0.9 here"):
        train(flags(tiny_corpus, tmp_path / "run", teacher, distill_alpha=0.9))


def test_stored_tokens_of_the_teacher_teach_the_same(
    pool: RankPool, plain: Path, teacher: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    """All of them, on two ranks of which each computes its windows; and a run that goes on computes nothing again."""
    pool.run(train, flags(tiny_corpus, tmp_path / "all", teacher, stage=3, teacher_top_k=256, micro_batch_size=2))
    for name in ("loss", "teacher_kl", "teacher_agreement", "eval_loss", "eval_teacher_kl"):
        there, here = ([r[name] for r in read_metrics(run) if name in r] for run in (plain, tmp_path / "all"))
        assert here == approx(there, rel=1e-4) and there, name
    line = flags(tiny_corpus, tmp_path / "few", teacher, teacher_top_k=8, micro_batch_size=4)
    _, printed = train(line)
    assert "top 8 tokens of the teacher for" in printed
    whole = losses(tmp_path / "few")
    assert whole != losses(plain)
    shutil.rmtree(list_checkpoints(tmp_path / "few")[-1])
    code, printed = train(line)
    assert code == 0 and "top 8 tokens" not in printed and "teacher   " not in printed
    assert losses(tmp_path / "few") == whole
    next((tmp_path / "few" / "teacher").glob("train_*/*.ids.npy")).unlink()
    shutil.rmtree(list_checkpoints(tmp_path / "few")[-1])
    code, printed = train(line)
    assert "top 8 tokens of the teacher for" in printed and losses(tmp_path / "few") == whole


def test_a_run_does_not_go_on_with_another_teacher(teacher: Path, tiny_corpus: Path, tmp_path: Path) -> None:
    shutil.copytree(teacher, tmp_path / "teacher")
    line = flags(tiny_corpus, tmp_path / "run", tmp_path / "teacher")
    train(line)
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    train(flags_for(tiny_corpus, tmp_path / "teacher", num_hidden_layers=2, steps=14, lr=1e-2, save_every=0))
    with pytest.raises(UserError, match=r"teacher: its weights are others than when this run began"):
        train(line)


def test_what_is_no_teacher_is_refused_before_the_run(tiny_corpus: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--objective distill and --teacher PATH are given together"):
        train(flags(tiny_corpus, tmp_path / "run", None, objective="distill"))
    with pytest.raises(UserError, match="nowhere"):
        train(flags(tiny_corpus, tmp_path / "run", tmp_path / "nowhere"))
    with pytest.raises(UserError, match="teacher_top_k: 257 is more than the model's 256 tokens"):
        train(flags(tiny_corpus, tmp_path / "run", teacher, teacher_top_k=257))
    with pytest.raises(UserError, match=r"teacher: .* has 256 tokens and this run's model 300; pass --vocab-size 256"):
        train(flags(tiny_corpus, tmp_path / "run", teacher, vocab_size=300))
    shutil.copytree(teacher, tmp_path / "other")
    file = next((tmp_path / "other").glob("tokenizer.*"))
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"teacher: .*other has another tokenizer .* than the shards"):
        train(flags(tiny_corpus, tmp_path / "run", tmp_path / "other"))
