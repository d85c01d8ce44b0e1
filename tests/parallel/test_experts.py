"""Experts under DeepSpeed against the plain model on one process: every backend, ZeRO stage and ep size."""

import math
import shutil
from types import SimpleNamespace

import pytest
import torch
from deepspeed.moe.ep_experts import GroupedExperts
from expert_runs import DENSE, EXPERTS, collapse_routers, spoil, train_plainly, walk
from pytest import approx
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn
from training_runs import EXPERTS as TRAINED_EXPERTS
from training_runs import MODEL, RankPool, flags_for, losses, rank_pool, read_metrics, train

from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.model.kernels.experts import cpu_experts
from minimind.parallel.experts import CastGroupedExperts, choose_grouped_product, find_grouped_product

STEPS = 20
MODELS = {None: DENSE, "autoep": EXPERTS, "deepspeed": EXPERTS}


@pytest.fixture(scope="module")
def pool():
    yield from rank_pool(2)


@pytest.fixture(scope="module")
def one_rank():
    yield from rank_pool(1)


@pytest.fixture(scope="module")
def plain():
    return {backend: train_plainly(model, STEPS) for backend, model in MODELS.items()}


def table(backend, sizes):
    """The cells of one row of the README's table."""
    return [(stage, MODELS[backend], {"moe_backend": backend, "ep_size": ep}) for stage in range(4) for ep in sizes]


def assert_same(found, expected):
    assert_curve(found, expected, 1e-4, 1e-3)
    assert max(found[1]) > 1.0, "nothing was clipped"


def assert_curve(found, expected, loss_tolerance, norm_tolerance):
    assert found[0] == approx(expected[0], rel=loss_tolerance)
    assert found[1] == approx(expected[1], rel=norm_tolerance)


def stages(backend):
    return (0, 1, 2) if backend == "deepspeed" else (0, 1, 2, 3)


@pytest.mark.parametrize("backend", MODELS)
def test_two_ranks_are_the_plain_loop(pool: RankPool, plain, backend):
    cells = table(backend, (None,) if backend is None else (1, 2))
    for ranks in pool.run(walk, cells, STEPS):
        for (stage, _, _), found in zip(cells, ranks, strict=True):
            if stage in stages(backend):
                assert_same(found, plain[backend])
            else:
                assert "does not run under ZeRO stage 3; use --moe-backend autoep" in found


@pytest.mark.parametrize("backend", ["autoep", "deepspeed"])
def test_one_rank_is_the_plain_loop_also_when_it_recomputes(one_rank: RankPool, plain, backend):
    """On one rank two micro-batches accumulate, and the recomputation must add nothing to the balance."""
    settings = {"moe_backend": backend, "activation_checkpointing": True}
    for curve in one_rank.run(walk, [(stage, EXPERTS, settings) for stage in stages(backend)], STEPS)[0]:
        assert_same(curve, plain[backend])


@pytest.mark.parametrize("backend", ["autoep", "deepspeed"])
def test_residual_experts_train_as_in_the_plain_loop(pool: RankPool, backend):
    model = {**EXPERTS, "n_shared_experts": 0, "moe_residual": True}
    expected = train_plainly(model, 5)
    cells = [(stage, model, {"moe_backend": backend, "ep_size": 2}) for stage in stages(backend)]
    for curve in pool.run(walk, cells, 5)[0]:
        assert_same(curve, expected)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
@pytest.mark.parametrize("backend", ["autoep", "deepspeed"])
def test_compiled_around_the_experts_nothing_changes(pool: RankPool, backend):
    model = {**EXPERTS, "num_hidden_layers": 2}
    expected = train_plainly(model, 4)
    cells = [(stage, model, {"moe_backend": backend, "ep_size": 2, "compile": "on"}) for stage in (0, 2)]
    for curve in pool.run(walk, cells, 4)[0]:
        assert_curve(curve, expected, 1e-4, 1e-3)


def test_ranks_and_groups_of_experts_are_equal_step_for_step(pool: RankPool, one_rank: RankPool):
    """AutoEP on one rank, on two that both hold all experts, and on two that hold half of them each."""
    cells = [(1, EXPERTS, {"ep_size": ep}) for ep in (1, 2)]
    alone, together = one_rank.run(walk, cells[:1], STEPS)[0], pool.run(walk, cells, STEPS)[0]
    for curve in together:
        assert_curve(curve, alone[0], 1e-6, 1e-4)


@pytest.mark.parametrize("backend", ["autoep", "deepspeed"])
def test_bf16_follows_fp32(pool: RankPool, plain, backend):
    settings = {"moe_backend": backend, "ep_size": 2, "precision": "bf16"}
    cells = [(stage, EXPERTS, settings) for stage in stages(backend)]
    expected = [figures[:5] for figures in plain[backend]]
    for curve in pool.run(walk, cells, 5)[0]:
        assert_curve(curve, expected, 2e-2, 1e-1)
        assert curve[0] != expected[0]


@pytest.mark.parametrize("backend", ["autoep", "deepspeed"])
def test_a_nan_on_one_rank_moves_no_weight_on_any(pool: RankPool, backend):
    for stage in stages(backend):
        for norm, same, first, last in pool.run(spoil, stage, EXPERTS, {"moe_backend": backend, "ep_size": 2}):
            assert not math.isfinite(norm) and same, (stage, norm)
            assert math.isfinite(first) and math.isfinite(last)


@pytest.mark.parametrize("backend", ["autoep", "deepspeed"])
def test_a_rank_whose_experts_get_no_token_keeps_step(pool: RankPool, backend):
    """Every token goes to the first rank's experts; the pool ends what hangs."""
    expected = train_plainly(EXPERTS, 4, collapsed=True)
    cells = [(stage, EXPERTS, {"moe_backend": backend, "ep_size": 2}) for stage in stages(backend)]
    for ranks in pool.run(walk, cells, 4, True):
        for curve in ranks:
            assert_curve(curve, expected, 1e-4, 1e-3)


# Whole runs, through the command.

RUN = {
    "hidden_size": 32, "use_moe": True, "num_experts": 8, "num_experts_per_tok": 1, "moe_intermediate_size": 32,
    "save_every": 0, "micro_batch_size": 4,
}  # fmt: skip


@pytest.mark.parametrize("coefficient", [0.01, 0.0])
def test_collapsed_routers_recover_by_the_auxiliary_loss_alone(one_rank: RankPool, tiny_corpus, tmp_path, coefficient):
    shape = {**MODEL, **RUN, "n_shared_experts": 1, "router_aux_loss_coef": coefficient}
    names = ModelConfig.__dataclass_fields__
    torch.manual_seed(0)
    model = MiniMindForCausalLM(ModelConfig(**{name: value for name, value in shape.items() if name in names}))
    collapse_routers(model, strength=1.0)
    model.save_pretrained(tmp_path / "collapsed")
    settings = {**RUN, "n_shared_experts": 1, "router_aux_loss_coef": coefficient, "init_from": tmp_path / "collapsed"}
    one_rank.run(train, flags_for(tiny_corpus, tmp_path / "run", steps=200, lr=3e-3, **settings))
    entropy = [record["load_entropy"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert entropy[0] < 0.1
    assert (sum(entropy[-20:]) / 20 > 0.9) == (coefficient > 0), entropy[-20:]


@pytest.mark.parametrize("backend", ["autoep", "deepspeed"])
def test_metrics_count_every_choice_once(pool: RankPool, one_rank: RankPool, tiny_corpus, tmp_path, backend):
    """Two ranks, one that accumulates, and one that recomputes say the same; TensorBoard has a histogram a layer."""
    others = {"two": {"ep_size": 2}, "one": {"micro_batch_size": 2}, "again": {"activation_checkpointing": True}}
    found = []
    for name, settings in others.items():
        run = {**RUN, "num_hidden_layers": 2, "num_experts_per_tok": 2, "micro_batch_size": 2, "steps": 2}
        run |= {"moe_backend": backend, "eval_every": 1, "tensorboard": name == "one", **settings}
        (pool if name == "two" else one_rank).run(train, flags_for(tiny_corpus, tmp_path / name, **run))
        found.append(read_metrics(tmp_path / name))
    for records in found:
        steps = [record for record in records if "loss" in record]
        assert len(steps) == 2 and len([record for record in records if "eval_loss" in record]) >= 2
        for step, other in zip(steps, (record for record in found[0] if "loss" in record), strict=True):
            load = step["expert_load"]
            assert load == other["expert_load"] and [sum(layer) for layer in load] == [4 * 16 * 2] * 2
            balance = {"min": [min(layer) for layer in load], "max": [max(layer) for layer in load]}
            assert step["expert_balance"].items() >= {**balance, "dropped": [0.0, 0.0]}.items()
            assert 0 < step["load_entropy"] <= 1 and step["aux_loss"] == approx(other["aux_loss"], rel=1e-5)
            assert step["loss"] == approx(other["loss"], rel=1e-4)
    events = EventAccumulator(str(tmp_path / "one" / "tensorboard")).Reload()
    assert sorted(events.Tags()["histograms"]) == ["experts/load_0", "experts/load_1"]
    assert "experts/load_entropy" in events.Tags()["scalars"]


def test_selection_biases_step_alike_on_every_rank_and_resume(
    pool: RankPool, one_rank: RankPool, tiny_corpus, tmp_path
):
    settings = {**RUN, "scoring_func": "sigmoid", "router_bias_update_rate": 0.05, "router_aux_loss_coef": 0.0}
    settings |= {"save_every": 2, "keep_last": 0, "micro_batch_size": 2}
    for name, runner, ep_size in (("one", one_rank, 1), ("two", pool, 2)):
        runner.run(train, flags_for(tiny_corpus, tmp_path / name, ep_size=ep_size, **settings))
    assert list(losses(tmp_path / "two").values()) == approx(list(losses(tmp_path / "one").values()), rel=1e-4)
    without = {**settings, "router_bias_update_rate": 0.0}
    one_rank.run(train, flags_for(tiny_corpus, tmp_path / "without", **without))
    assert losses(tmp_path / "without") != losses(tmp_path / "one"), "the biases choose nobody"
    before = losses(tmp_path / "two")
    for step in (4, 6):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / f"step_{step:08d}")
    pool.run(train, flags_for(tiny_corpus, tmp_path / "two", ep_size=2, **settings))
    assert losses(tmp_path / "two") == before


@pytest.mark.parametrize(("backend", "stage"), [("autoep", 0), ("autoep", 2), ("autoep", 3), ("deepspeed", 1)])
def test_a_resume_on_the_same_ranks_is_the_uninterrupted_run(pool: RankPool, tiny_corpus, tmp_path, backend, stage):
    noise = {"moe_gate_noise": "jitter"} if backend == "deepspeed" else {}
    settings = {**RUN, "micro_batch_size": 2, "save_every": 2, "keep_last": 0, "moe_backend": backend, "ep_size": 2}
    flags = flags_for(tiny_corpus, tmp_path, stage=stage, **{**settings, **noise})
    pool.run(train, flags)
    before = losses(tmp_path)
    for step in (4, 6):
        shutil.rmtree(tmp_path / "checkpoints" / f"step_{step:08d}")
    pool.run(train, flags)
    assert losses(tmp_path) == before


# AutoEP's experts on a CPU.


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("counts", [[8, 16, 8], [8, 0, 16], [0, 0, 0]], ids=str)
def test_experts_of_rows_are_deepspeed_s_own(dtype, counts):
    """Values and all gradients, beside DeepSpeed's loop, with rows at the end that belong to nobody."""
    torch.manual_seed(0)
    experts = GroupedExperts(16, 24, num_experts=3, use_grouped_mm=False)
    for parameter in experts.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    experts.to(dtype)
    rows = torch.randn(36, 16, dtype=dtype, requires_grad=True)
    inputs = (rows, *experts.parameters())
    probe = torch.randn(36, 16, dtype=dtype)
    theirs = experts(rows, torch.tensor(counts))
    ours = cpu_experts(rows, counts, experts.w1, experts.w3, experts.w2)
    for found, wanted in zip(
        (ours, *torch.autograd.grad(ours, inputs, probe)),
        (theirs, *torch.autograd.grad(theirs, inputs, probe, materialize_grads=True)),
        strict=True,
    ):
        assert found.dtype == wanted.dtype and found.shape == wanted.shape
        assert (found - wanted).norm() <= (1e-5 if dtype == torch.float32 else 2e-2) * wanted.norm()
    assert any(counts) == bool(ours.any()) and not ours[sum(counts) :].any()


@pytest.mark.parametrize(("kind", "expected"), [(GroupedExperts, torch.float32), (CastGroupedExperts, torch.bfloat16)])
def test_under_autocast_experts_multiply_in_its_type(monkeypatch, kind, expected):
    """Autocast does not know the grouped product: DeepSpeed's own hands it float32 rows."""

    def product(rows, *_, **__):
        raise RuntimeError(f"rows in {rows.dtype}")

    monkeypatch.setattr(torch, "_grouped_mm", product)
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError, match=f"rows in {expected}"):
        kind(16, 24, num_experts=3)(torch.randn(6, 16), torch.tensor([1, 2, 3]))


@pytest.mark.parametrize(
    ("precision", "major", "expected"),
    [("bf16", 8, "triton"), ("bf16", 9, "torch"), ("bf16", 10, "torch"), ("bf16", 12, "triton"), ("fp16", 7, "triton"),
     ("fp16", 9, "triton"), ("fp16", 6, "loop"), ("fp32", 8, "loop"), ("fp32", 12, "loop")],
)  # fmt: skip
def test_each_gpu_gets_the_product_of_experts_that_it_has(monkeypatch, precision, major, expected):
    monkeypatch.setattr("minimind.parallel.experts.is_triton_available", lambda: True)
    monkeypatch.setattr("minimind.parallel.experts.compute_capability", lambda device: (major, 0))
    assert find_grouped_product(precision, torch.device("cuda")) == expected
    layer, train = GroupedExperts(16, 24, num_experts=3), SimpleNamespace(precision=precision)
    for ds, taken in ({}, expected == "triton"), ({"expert_parallel": {"disable_triton_grouped_mm": True}}, False):
        layer.use_triton_grouped_mm = False
        choose_grouped_product(SimpleNamespace(ds=ds, train=train), nn.Sequential(layer), torch.device("cuda"))
        assert layer.use_triton_grouped_mm == taken
    monkeypatch.setattr("minimind.parallel.experts.is_triton_available", lambda: False)
    assert find_grouped_product(precision, torch.device("cuda")) == ("torch" if expected == "torch" else "loop")


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_no_run_on_a_cpu_meets_torch_s_grouped_product(tiny_corpus, tmp_path, monkeypatch, precision):
    """It is a plain loop there in 16 bit: a hundredth of the speed on many processors."""

    def refuse(*_, **__):
        raise AssertionError("torch's grouped product")

    monkeypatch.setattr(torch, "_grouped_mm", refuse)
    code, _ = train(flags_for(tiny_corpus, tmp_path, stage=2, precision=precision, **TRAINED_EXPERTS))
    assert code == 0 and len(losses(tmp_path)) == 6
