"""Learning from pairs and from judged answers: the formulas of the papers, gradients of an independent loop, any ranks
and stage, a stop."""

import itertools
import json
import math
import random
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from pytest import approx
from tokenizers_for_tests import save_byte_level
from training_runs import MODEL, RankPool, flags_for, losses, rank_pool, read_metrics, train, weights

from data_prep.tokenize_corpus import prepare
from data_prep.tokenize_preferences import TokenizePreferencesFlags
from data_prep.writing.encode_chat import PreferenceOptions
from minimind.checkpoints.folder import list_checkpoints
from minimind.config.run_config import TrainConfig
from minimind.data.chat_template import load_chat_template
from minimind.data.dataset import PackedDataset, load_shards
from minimind.data.loader import collate
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.evaluate import main as evaluate_main
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.training.objectives.preference import LOSSES, Answers, Preference

CHOSEN, REJECTED = (-3.0, -8.0, -1.5), (-4.0, -2.5, -9.0)
CHOSEN_REFERENCE, REJECTED_REFERENCE = (-3.5, -6.0, -1.0), (-3.0, -3.0, -7.0)
CHOSEN_LENGTH, REJECTED_LENGTH = (2, 5, 1), (3, 2, 6)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def paper_dpo(c: float, r: float, cr: float, rr: float, nc: int, nr: int) -> float:
    return -math.log(sigmoid(0.3 * math.log(math.exp(c - cr) / math.exp(r - rr))))


def paper_smooth_dpo(c: float, r: float, cr: float, rr: float, nc: int, nr: int) -> float:
    h = 0.3 * ((c - cr) - (r - rr))
    return -0.9 * math.log(sigmoid(h)) - 0.1 * math.log(sigmoid(-h))


def paper_normalised_dpo(c: float, r: float, cr: float, rr: float, nc: int, nr: int) -> float:
    return paper_dpo(c / nc, r / nr, cr / nc, rr / nr, 1, 1)


def paper_ipo(c: float, r: float, cr: float, rr: float, nc: int, nr: int) -> float:
    return ((c - cr) / nc - (r - rr) / nr - 1 / (2 * 0.3)) ** 2


def paper_orpo(c: float, r: float, cr: float, rr: float, nc: int, nr: int) -> float:
    def odds(p: float) -> float:
        return p / (1 - p)

    p_chosen, p_rejected = math.exp(c / nc), math.exp(r / nr)
    return -c / nc - 0.3 * math.log(sigmoid(math.log(odds(p_chosen) / odds(p_rejected))))


def paper_simpo(c: float, r: float, cr: float, rr: float, nc: int, nr: int) -> float:
    return -math.log(sigmoid(0.3 / nc * c - 0.3 / nr * r - 0.3 * 0.5))


@pytest.mark.parametrize(
    ("name", "flags", "paper"),
    [
        ("dpo", {}, paper_dpo),
        ("dpo", {"label_smoothing": 0.1}, paper_smooth_dpo),
        ("dpo", {"length_normalised": True}, paper_normalised_dpo),
        ("ipo", {}, paper_ipo),
        ("orpo", {}, paper_orpo),
        ("simpo", {}, paper_simpo),
    ],
)
def test_losses_and_their_derivatives_are_those_of_the_papers(name, flags, paper) -> None:  # type: ignore[no-untyped-def]
    rows = [CHOSEN, REJECTED, CHOSEN_REFERENCE, REJECTED_REFERENCE, CHOSEN_LENGTH, REJECTED_LENGTH]
    tensors = [torch.tensor(row, dtype=torch.float64, requires_grad=place < 2) for place, row in enumerate(rows)]
    ours = LOSSES[name](Answers(*tensors), TrainConfig(beta=0.3, **flags))
    expected = [paper(*column) for column in zip(*rows, strict=True)]
    assert ours.tolist() == approx(expected, rel=1e-6)
    slopes = torch.autograd.grad(ours.sum(), tensors[:2])
    for side, slope in enumerate(slopes):
        for pair, column in enumerate(zip(*rows, strict=True)):
            up, down = list(column), list(column)
            up[side] += 1e-5
            down[side] -= 1e-5
            assert slope[pair].item() == approx((paper(*up) - paper(*down)) / 2e-5, rel=1e-5, abs=1e-9)


def test_kto_is_that_of_the_paper() -> None:
    """Value function and gradient of section 4 of arXiv 2402.01306, the reference point z a constant."""
    liked, other = [True, False, False], [0.0, 0.0, 0.0]
    rows = [torch.tensor(row, dtype=torch.float64) for row in (CHOSEN, other, CHOSEN_REFERENCE, other, other, other)]
    rows[0].requires_grad_()
    answers = Answers(*rows, liked=torch.tensor(liked), baseline=0.75)  # type: ignore[arg-type]
    ours = LOSSES["kto"](answers, TrainConfig(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5))
    (slopes,) = torch.autograd.grad(ours.sum(), rows[0])
    for place, (policy, reference, good) in enumerate(zip(CHOSEN, CHOSEN_REFERENCE, liked, strict=True)):
        reward, weight = math.log(math.exp(policy) / math.exp(reference)), 1.5 if good else 0.5
        value = weight * (sigmoid(0.3 * (reward - 0.75)) if good else sigmoid(0.3 * (0.75 - reward)))
        assert ours[place].item() == approx(weight - value, rel=1e-6)
        steepness = sigmoid(0.3 * (reward - 0.75)) * sigmoid(0.3 * (0.75 - reward))
        assert slopes[place].item() == approx((-1 if good else 1) * weight * 0.3 * steepness, rel=1e-6)


def make_pairs(count: int) -> list[dict[str, object]]:
    """The preferred answer is the word again, the other one something longer."""
    words = random.Random(0).sample(["".join(letters) for letters in itertools.product("abcdef", repeat=3)], count)
    pairs = []
    for number, word in enumerate(words):
        question = [{"role": "user", "content": f"say {word}"}]
        good, bad = ({"role": "assistant", "content": text} for text in (word, f"no {word}"))
        pairs.append({"chosen": [*question, good], "rejected": [*question, bad], "id": number})
    return pairs


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("preferences")
    tokenizer = save_byte_level(folder / "tokenizer")
    source = folder / "pairs.jsonl"
    source.write_text("".join(json.dumps(pair) + "\n" for pair in make_pairs(40)))
    names = {"input": (str(source),), "tokenizer": tokenizer, "output": folder / "shards", "val_fraction": 0.2}
    prepare(TokenizePreferencesFlags(**names, val_input=(), workers=1), PreferenceOptions)
    return folder / "shards"


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The answers of the pairs one by one, each with its label."""
    folder = tmp_path_factory.mktemp("feedback")
    tokenizer = save_byte_level(folder / "tokenizer")
    pairs = [(pair[name], name == "chosen") for pair in make_pairs(20) for name in ("chosen", "rejected")]
    records = [{"messages": messages, "label": label} for messages, label in pairs]
    (folder / "judged.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    names = {"tokenizer": tokenizer, "output": folder / "shards", "val_fraction": 0.2, "unpaired": True}
    prepare(TokenizePreferencesFlags(input=(str(folder / "judged.jsonl"),), workers=1, **names), PreferenceOptions)
    return folder / "shards"


def test_feedback_is_each_answer_and_the_question_with_another_one(judged: Path) -> None:
    dataset, tokenizer = load_shards(judged, seq_len=128), load_tokenizer(judged / "train")
    num_liked = num_disliked = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.answers is not None and sample.pairs is not None and sample.liked is not None
        for place in range(len(sample.pairs)):
            own, other = (
                tokenizer.decode(sample.labels[sample.answers == 2 * place + side].tolist()) for side in (0, 1)
            )
            assert own != other and own.startswith("no ") is not bool(sample.liked[place])
        num_liked += int(sample.liked.sum())
        num_disliked += int((~sample.liked).sum())
    assert min(num_liked, num_disliked) > 10 and num_liked + num_disliked == dataset.reader.manifest.total_documents


def test_the_gradient_of_kto_is_that_of_a_plain_loop(judged: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The baseline is the mean over the answers to other questions of all micro-batches, and has no gradient."""
    monkeypatch.setattr("minimind.training.objectives.preference.all_reduce_sum", lambda tensor: tensor)
    torch.manual_seed(0)
    config = ModelConfig(**{**MODEL, "vocab_size": 400, "max_position_embeddings": 128, "initializer_range": 0.3})
    model = MiniMindForCausalLM(config)
    model.device = torch.device("cpu")
    dataset = load_shards(judged, seq_len=128)
    settings = TrainConfig(beta=0.2, desirable_weight=1.2)
    reference = np.random.default_rng(0).normal(-90, 9, (dataset.reader.manifest.total_documents, 2)).astype(np.float32)
    batches = [collate([dataset[index]], [index], reference) for index in range(3)]
    objective = Preference(settings, "kto")
    parts = [objective.loss(model, batch) for batch in objective.roll_out(model, batches, 0)]
    sum(part.loss for part in parts).backward()  # type: ignore[union-attr]
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    moved, other, liked = [], [], []
    for batch in batches:
        logits = model(batch.input_ids, position_ids=batch.position_ids, cu_seqlens=batch.cu_seqlens).logits
        found = -F.cross_entropy(logits[0], batch.labels[0], reduction="none")
        for place, document in enumerate(batch.pairs):
            own, foreign = (found[batch.answers[0] == 2 * place + side].sum() for side in (0, 1))  # type: ignore[index]
            moved.append(own - float(reference[document, 0]))
            other.append(foreign.item() - float(reference[document, 1]))
            liked.append(bool(batch.liked[place]))  # type: ignore[index]
    baseline = max(sum(other) / len(other), 0.0)
    assert baseline > 1, "it does not matter here"
    signed = [(r - baseline) * (1 if good else -1) for r, good in zip(moved, liked, strict=True)]
    weights_ = [1.2 if good else 1.0 for good in liked]
    total = sum(w * (1 - torch.sigmoid(0.2 * r)) for w, r in zip(weights_, signed, strict=True))
    total.backward()  # type: ignore[union-attr]
    assert sum(part.loss.item() for part in parts) == approx(total.item(), rel=1e-5)  # type: ignore[union-attr]
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        assert (ours[key] - parameter.grad).abs().max() <= 1e-5 * parameter.grad.abs().max() + 1e-7, key
    means = {name: sum(part.figures[name] for part in parts).item() / len(liked) for name in parts[0].figures}  # type: ignore[union-attr]
    assert means["kl"] == approx(baseline, rel=1e-4)
    assert means["reward_accuracy"] == approx(sum(r > 0 for r in signed) / len(liked))


def encode_pairs(shards: Path) -> list[list[tuple[list[int], list[int]]]]:
    """(token ids, labels) of both conversations of every training pair, by the template alone."""
    tokenizer = load_tokenizer(next((shards / "train").glob("tokenizer*")))
    template = load_chat_template(tokenizer)
    pairs = []
    for record in make_pairs(40):
        sides = []
        for name in ("chosen", "rejected"):
            ids, targets = template.encode(record[name])  # type: ignore[arg-type]
            sides.append((ids, [token if target else -100 for token, target in zip(ids, targets, strict=True)]))
        pairs.append(sides)
    return pairs


def test_pairs_lie_whole_in_windows(shards: Path) -> None:
    dataset = load_shards(shards, seq_len=128)
    assert isinstance(dataset, PackedDataset)
    known = {tuple(map(tuple, (side[0] for side in pair))) for pair in encode_pairs(shards)}
    found = 0
    for index in range(len(dataset)):
        sample = dataset[index]
        assert sample.pairs is not None and sample.answers is not None and sample.document_starts is not None
        bounds = [0, *sample.document_starts.tolist(), 128]
        for pair in range(len(sample.pairs)):
            chosen, rejected = (
                sample.input_ids[bounds[2 * pair + side] : bounds[2 * pair + side + 1]] for side in (0, 1)
            )
            match = [one for one in known if one[0] == tuple(chosen) and one[1][: len(rejected)] == tuple(rejected)]
            assert len(match) == 1, "the window holds something else than a pair"
            found += 1
            for side in (0, 1):
                places = np.flatnonzero(sample.answers == 2 * pair + side)
                assert bounds[2 * pair + side] <= places.min() <= places.max() < bounds[2 * pair + side + 1]
    assert found == dataset.reader.manifest.total_documents
    with pytest.raises(UserError, match="no pair fits a window of seq_len 16"):
        load_shards(shards, seq_len=16)


@pytest.mark.parametrize("name", ["dpo", "orpo"])
def test_gradients_are_those_of_a_plain_loop(shards: Path, name: str) -> None:
    """Pairs packed into windows, weights from the derivative; against every conversation alone and autograd."""
    torch.manual_seed(0)
    config = ModelConfig(**{**MODEL, "vocab_size": 400, "max_position_embeddings": 128, "initializer_range": 0.3})
    model = MiniMindForCausalLM(config)
    dataset = load_shards(shards, seq_len=128)
    settings = TrainConfig(beta=0.5)
    reference = np.random.default_rng(0).normal(-9, 2, (dataset.reader.manifest.total_documents, 2)).astype(np.float32)
    batch = collate([dataset[index] for index in range(len(dataset))], range(len(dataset)), reference)
    parts = Preference(settings, name).loss(model, batch)  # type: ignore[arg-type]
    parts.loss.backward()
    ours = {key: parameter.grad.clone() for key, parameter in model.named_parameters()}  # type: ignore[union-attr]
    model.zero_grad()
    train_pairs = []
    reader = dataset.reader
    starts = [*reader.document_starts(0, reader.num_tokens).tolist(), reader.num_tokens]
    stored = {tuple(reader.read(a, b - a - 1).tolist()): i for i, (a, b) in enumerate(itertools.pairwise(starts))}
    for sides in encode_pairs(shards):
        key = tuple(sides[0][0] + sides[1][0])
        if key in stored:
            train_pairs.append((stored[key], sides))
    assert len(train_pairs) == len(batch.pairs)
    total = torch.zeros(())
    for document, sides in train_pairs:
        sums, lengths = [], []
        for ids, labels in sides:
            logits = model(torch.tensor([ids])).logits[0, :-1]
            targets = torch.tensor(labels[1:])
            sums.append(-F.cross_entropy(logits, targets, reduction="sum").view(1))
            lengths.append((targets != -100).sum().view(1).float())
        start = torch.from_numpy(reference[document]).view(2, 1)
        total = total + LOSSES[name](Answers(*sums, *start, *lengths), settings).sum()  # type: ignore[index]
    total.backward()
    assert parts.loss.item() == approx(total.item(), rel=1e-5)
    for key, parameter in model.named_parameters():
        assert parameter.grad is not None
        difference = (ours[key] - parameter.grad).abs().max()
        assert difference <= 1e-5 * parameter.grad.abs().max() + 1e-7, key


@pytest.fixture(scope="module")
def pool() -> Iterator[RankPool]:
    yield from rank_pool(2)


def flags(shards: Path, run_dir: Path, **others: object) -> list[str]:
    settings = {"vocab_size": 400, "seq_len": 64, "max_position_embeddings": 64, "steps": 4, "lr": 1e-2, **others}
    return flags_for(shards, run_dir, **settings)


@pytest.fixture(scope="module")
def plain(shards: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    run_dir = tmp_path_factory.mktemp("runs") / "plain"
    train(flags(shards, run_dir, eval_every=4))
    return run_dir


def test_a_run_begins_without_a_preference_and_learns_one(plain: Path) -> None:
    steps = [record for record in read_metrics(plain) if "loss" in record]
    assert steps[0]["loss"] == approx(math.log(2), rel=1e-6) and steps[0]["kl"] == approx(0, abs=1e-5)
    assert steps[-1]["loss"] < steps[0]["loss"] and steps[-1]["reward_margin"] > 0
    evaluation = next(record for record in read_metrics(plain) if "eval_loss" in record)
    assert evaluation["eval_reward_accuracy"] > 0.5 and evaluation["eval_targets"] >= 1


@pytest.mark.parametrize("name", LOSSES)
def test_any_stage_and_ranks_give_the_same_losses(
    pool: RankPool, shards: Path, judged: Path, tmp_path: Path, name: str
) -> None:
    corpus, expected = judged if name == "kto" else shards, None
    settings = {"objective": name, "steps": 3, "save_every": 0, "eval_every": 3, "beta": 0.5}
    # (ranks, ranks that share each sequence, stage)
    for ranks, sp_size, stage in (*((ranks, 1, stage) for ranks in (1, 2) for stage in (1, 2, 3)), (2, 2, 2)):
        run_dir = tmp_path / f"{ranks}_{sp_size}_{stage}"
        line = flags(corpus, run_dir, stage=stage, sp_size=sp_size, **settings)
        _ = train(line) if ranks == 1 else pool.run(train, line)
        found = [[r.get(key) for key in ("loss", "eval_loss", "eval_targets")] for r in read_metrics(run_dir)]
        found = [value for record in found for value in record if value is not None]
        expected = expected or found
        assert len(found) == 5 and found == approx(expected, rel=1e-4), (ranks, sp_size, stage)


@pytest.mark.parametrize("stage", [1, 3])
def test_a_live_reference_gives_what_the_stored_one_does(
    pool: RankPool, plain: Path, shards: Path, judged: Path, tmp_path: Path, stage: int
) -> None:
    for name, corpus in (("dpo", shards), ("kto", judged)):
        found = {}
        for form in ("stored", "live", "shared"):  # the last: live, on ranks that share each sequence
            run_dir = tmp_path / f"{name}_{form}"
            others = {"init_from": plain, "objective": name, "beta": 0.5, "eval_every": 4}
            others |= {"reference": "stored"} if form == "stored" else {"reference": "live"}
            others |= {"sp_size": 2 if form == "shared" else 1}
            printed = pool.run(train, flags(corpus, run_dir, stage=stage, save_every=0, **others))[0][1]
            assert (
                "partitioned over the ranks" if stage == 3 else "whole on every rank"
            ) in printed or form == "stored"
            found[form] = [record.get("loss", record.get("eval_loss")) for record in read_metrics(run_dir)]
            assert bool(list((run_dir / "reference").glob("*.npy"))) == (form == "stored")
        assert found["live"] == approx(found["stored"], rel=1e-5), name
        assert found["shared"] == approx(found["stored"], rel=1e-4), name
        assert len(found["live"]) == 5 and found["live"][-1] != approx(found["live"][0], rel=1e-3)


def test_a_live_reference_that_cannot_be_is_refused(plain: Path, shards: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="live is the model that --init-from names"):
        train(flags(shards, tmp_path, reference="live"))
    with pytest.raises(UserError, match="live has no effect on orpo"):
        train(flags(shards, tmp_path, reference="live", init_from=plain, objective="orpo"))
    with pytest.raises(UserError, match="length_normalised: True has no effect on ipo, only on dpo; leave it out"):
        train(flags(shards, tmp_path, objective="ipo", length_normalised=True))
    with pytest.raises(UserError, match="400 tokens, this run 401"):
        train(flags(shards, tmp_path, reference="live", init_from=plain, vocab_size=401))


def test_a_resumed_run_is_the_uninterrupted_one(plain: Path, shards: Path, tmp_path: Path) -> None:
    shutil.copytree(plain, tmp_path / "run")
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    train(flags(shards, tmp_path / "run", eval_every=4))
    assert losses(tmp_path / "run") == losses(plain)
    there, here = weights(plain), weights(tmp_path / "run")
    assert all(torch.equal(here[name], there[name]) for name in there)
    next((tmp_path / "run" / "reference").glob("train_*.npy")).unlink()
    shutil.rmtree(list_checkpoints(tmp_path / "run")[-1])
    with pytest.raises(UserError, match=r"train_\w+.npy: .*bring the file back, or begin anew"):
        train(flags(shards, tmp_path / "run", eval_every=4))
    with pytest.raises(UserError, match="beta"):
        train(flags(shards, tmp_path / "run", beta=0.2))


@pytest.mark.parametrize("name", [name for name in LOSSES if name != "dpo"])
def test_a_resumed_run_of_any_objective_is_the_uninterrupted_one(
    shards: Path, judged: Path, tmp_path: Path, name: str
) -> None:
    line = flags(judged if name == "kto" else shards, tmp_path, objective=name, eval_every=2, dropout=0.1)
    train(line)
    whole, last = read_metrics(tmp_path), weights(tmp_path)
    shutil.rmtree(list_checkpoints(tmp_path)[-1])
    train(line)
    kept = ("step", "loss", "kl", "chosen_log_prob", "eval_loss", "eval_reward_margin")
    there, here = ([[record.get(key) for key in kept] for record in one] for one in (whole, read_metrics(tmp_path)))
    assert here == there and all(torch.equal(value, last[key]) for key, value in weights(tmp_path).items())


def test_the_objective_must_fit_the_data(
    shards: Path, judged: Path, plain: Path, tiny_corpus: Path, tmp_path: Path
) -> None:
    with pytest.raises(UserError, match=r"dpo learns from pairs of answers, and .* holds judged answers"):
        train(flags(judged, tmp_path, objective="dpo"))
    with pytest.raises(UserError, match=r"kto learns from judged answers, and .* holds pairs of answers"):
        train(flags(shards, tmp_path, objective="kto"))
    with pytest.raises(UserError, match="holds judged answers, which compare no two; give pairs"):
        evaluate_main(["--checkpoint", str(plain), "--shards", str(judged), "--seq-len", "64"])
    with pytest.raises(UserError, match=r"pretrain learns from texts or conversations, and .* holds pairs of answers"):
        train(flags(shards, tmp_path, objective="pretrain"))
    with pytest.raises(UserError, match=r"simpo learns from pairs of answers, and .* holds texts or conversations"):
        train(flags(tiny_corpus, tmp_path, objective="simpo"))


def test_evaluate_says_how_often_the_preferred_answer_is_the_more_probable_one(
    plain: Path, shards: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    evaluate_main(["--checkpoint", str(plain), "--shards", str(shards), "--split", "train", "--seq-len", "64"])
    found = json.loads((plain / "evaluation.json").read_text())
    assert f"accuracy        {found['accuracy']:.4f}" in capsys.readouterr().out
    assert found["accuracy"] > 0.9, "the preferred answer is the shorter one"


def test_a_filling_window_counts_no_pair(shards: Path) -> None:
    dataset = load_shards(shards, seq_len=64)
    sample = dataset[0]
    assert sample.pairs is not None and sample.answers is not None
    nothing = np.full_like(sample.labels, -1)
    empty = replace(sample, labels=nothing * 100, pairs=sample.pairs[:0], answers=nothing)
    batch = collate([empty], [-1], np.zeros((40, 2), dtype=np.float32))
    model = MiniMindForCausalLM(ModelConfig(**{**MODEL, "vocab_size": 400}))
    parts = Preference(TrainConfig(), "dpo").loss(model, batch)
    assert parts.loss.item() == 0 and SimpleNamespace(**parts.figures).reward_accuracy.item() == 0
