"""Distillation: the formulas by autograd, a student that comes closer, any ranks and stage, a stop, wrong teachers."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from training_runs import EXPERTS, MODEL, RankPool, flags_for, losses, rank_pool, read_metrics, train, weights

from minimind.checkpoints.folder import list_checkpoints
from minimind.checkpoints.formats.frozen_model import FrozenModel
from minimind.config.run_config import TrainConfig
from minimind.data.dataset import load_shards
from minimind.data.loader import collate
from minimind.errors import UserError
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.training.objectives.distillation import Distillation


def as_frozen(model: MiniMindForCausalLM) -> FrozenModel:
    """A model in memory, whole."""
    frozen = FrozenModel.__new__(FrozenModel)
    frozen.model, frozen._body, frozen._is_partitioned = model.requires_grad_(False), model.model, False
    return frozen


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
        parts = Distillation(settings, as_frozen(teacher)).loss(student, batch)
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


def test_a_student_comes_closer_to_its_teacher(plain: Path) -> None:
    records = read_metrics(plain)
    steps = [record for record in records if "loss" in record]
    assert steps[-1]["teacher_kl"] < 0.7 * steps[0]["teacher_kl"]
    assert 0 <= steps[-1]["teacher_agreement"] <= 1
    assert next(record for record in records if "eval_loss" in record)["eval_teacher_kl"] > 0


@pytest.mark.parametrize("ranks", [1, 2])
def test_any_stage_and_ranks_give_the_same_losses(
    pool: RankPool, plain: Path, teacher: Path, tiny_corpus: Path, tmp_path: Path, ranks: int
) -> None:
    for stage in (1, 2, 3):
        line = flags(tiny_corpus, tmp_path / str(stage), teacher, stage=stage, save_every=0)
        _, printed = train(line) if ranks == 1 else pool.run(train, line)[0]
        assert ("partitioned over the ranks" if stage == 3 else "whole on every rank") in printed
        assert list(losses(tmp_path / str(stage)).values()) == approx(list(losses(plain).values()), rel=1e-4)


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


def test_what_is_no_teacher_is_refused_before_the_run(tiny_corpus: Path, teacher: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"--objective distill and --teacher PATH are given together"):
        train(flags(tiny_corpus, tmp_path / "run", None, objective="distill"))
    with pytest.raises(UserError, match="nowhere"):
        train(flags(tiny_corpus, tmp_path / "run", tmp_path / "nowhere"))
    with pytest.raises(UserError, match=r"teacher: .* has 256 tokens and this run's model 300; pass --vocab-size 256"):
        train(flags(tiny_corpus, tmp_path / "run", teacher, vocab_size=300))
    shutil.copytree(teacher, tmp_path / "other")
    file = next((tmp_path / "other").glob("tokenizer.*"))
    file.write_bytes(file.read_bytes() + b"\n")
    with pytest.raises(UserError, match=r"teacher: .*other has another tokenizer .* than the shards"):
        train(flags(tiny_corpus, tmp_path / "run", tmp_path / "other"))
