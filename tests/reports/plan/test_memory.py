"""The memory estimate, item by item against counts made by hand, and against what autograd really keeps."""

import dataclasses
from typing import Any

import pytest
import torch
from activation_formula import layer_activations_per_token

from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.model import MiniMindForCausalLM
from minimind.model.config import ModelConfig
from minimind.model.kernels import matmul
from minimind.model.kernels.apply import apply_kernels
from minimind.model.loss import CHUNK_LOGITS
from minimind.model.presets import PRESETS
from minimind.reports.plan.activations import activation_bytes
from minimind.reports.plan.memory import (
    MemoryEstimate,
    count_expert_params,
    estimate_memory,
    largest_micro_batch,
    largest_tensor,
)
from minimind.units import format_bytes

MODEL = PRESETS["minimind3"]
PARAMS = MODEL.num_params()


def resolve(
    stage: int,
    *,
    world_size: int = 1,
    zero: dict | None = None,
    bf16: dict | None = None,
    model: ModelConfig = MODEL,
    **train: Any,
):
    ds = {"zero_optimization": {"stage": stage, **(zero or {})}, "data_types": {"grad_accum_dtype": "fp32"}}
    if bf16:
        ds["bf16"] = {"enabled": "auto", **bf16}
    if stage == 0:
        del ds["data_types"]
    train = {"micro_batch_size": 2, "optimizer": "adamw", **train}
    run = RunConfig(model=model, data=DataConfig(seq_len=128), train=TrainConfig(**train))
    return resolve_run(run, ds, world_size=world_size, device_type="cuda", bf16_supported=True)


def estimate(stage: int, *, device: str = "cuda", **others: Any):
    return estimate_memory(resolve(stage, **others), device)


TABLES = 128 * 2 * 96 * 4
"""Cosines and sines of the positions of one row."""


def test_a_gpu_takes_the_norm_of_stages_2_and_3_in_float64():
    updates = [estimate(stage, precision="bf16", world_size=64).update for stage in range(4)]
    assert updates[:2] == [0, 0] and updates[2:] == [8 * largest_tensor(MODEL)] * 2


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_a_parameter"),
    [
        (0, "fp32", (4, 4, 8)),
        (0, "bf16", (4, 4, 8)),  # stage 0 autocasts: the weights stay float32
        (1, "fp32", (4, 4, 12)),  # ZeRO updates a copy, also in float32
        (1, "bf16", (2, 6, 12)),  # whole float32 sums beside the backward's own gradients
        (2, "bf16", (2, 4, 12)),
        (3, "fp16", (2, 4, 12)),
    ],
)
@pytest.mark.parametrize("world_size", [1, 4])
def test_states_are_counted_as_the_stage_partitions_them(stage, precision, bytes_a_parameter, world_size):
    found = estimate(stage, precision=precision, world_size=world_size)
    weights, gradients, optimizer = bytes_a_parameter
    share = PARAMS // world_size
    assert found.parameters == (share if stage == 3 else PARAMS) * weights
    whole = stage == 0 or (stage, precision) == (1, "bf16")
    assert found.gradients == (PARAMS if whole else share) * gradients
    assert found.optimizer == (share if stage >= 1 else PARAMS) * optimizer
    assert found.host == 0 and (found.gathered > 0) == (stage == 3 and world_size > 1)
    assert (
        found.states
        < found.total
        < found.states + sum((found.activations, found.logits, found.buckets, 2 * found.gathered, found.update, 2**28))
    )


def test_gradients_that_are_summed_at_once_are_not_kept_twice():
    at_once = estimate(1, precision="bf16", bf16={"immediate_grad_update": True})
    assert at_once.gradients == PARAMS * 4
    assert estimate(1, precision="bf16").total > at_once.total


@pytest.mark.parametrize(("stage", "precision"), [(0, "fp32"), (0, "bf16"), (1, "bf16")])
def test_one_rank_has_no_buffer_to_average_in(stage, precision):
    assert estimate(stage, precision=precision).buckets == 0
    assert estimate(stage, precision=precision, world_size=2).buckets >= PARAMS * 4


def test_offload_moves_states_to_the_host():
    on_device = estimate(3, precision="bf16", world_size=4)
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded = estimate(3, precision="bf16", zero=both, world_size=4)
    assert offloaded.optimizer == offloaded.parameters == offloaded.gradients == 0
    assert offloaded.host == on_device.optimizer + on_device.parameters + on_device.gradients
    assert offloaded.total < on_device.total
    assert "; host " in offloaded.summary() and "host" not in on_device.summary()


def test_a_second_copy_inside_the_node_is_counted():
    plain = estimate(3, precision="bf16", world_size=4)
    hpz = estimate(3, precision="bf16", world_size=4, zero={"zero_hpz_partition_size": 2})
    assert hpz.parameters == plain.parameters + PARAMS // 2 * 2


def test_zero3_keeps_no_more_whole_weights_than_it_may():
    large = PRESETS["large"]
    free = estimate(3, model=large, world_size=8, precision="bf16", zero={"stage3_max_live_parameters": 2_000_000_000,
                    "stage3_max_reuse_distance": 2_000_000_000})  # fmt: skip
    tight = estimate(3, model=large, world_size=8, precision="bf16", zero={"stage3_max_live_parameters": 0,
                     "stage3_prefetch_bucket_size": 0})  # fmt: skip
    assert free.gathered == large.num_params() * 2 > 5 * tight.gathered > 0
    assert estimate(3, world_size=1).gathered == 0, "one rank has every weight already"


def test_experts_are_divided_by_the_ranks_that_share_them():
    model = PRESETS["minimind3-moe"]
    experts = count_expert_params(model)
    assert experts == 8 * 4 * 3 * 768 * 2432
    alone, shared = (estimate(1, model=model, world_size=4, precision="fp32", ep_size=ep) for ep in (1, 4))
    assert alone.parameters - shared.parameters == 4 * (experts - experts // 4)
    assert alone.optimizer == shared.optimizer, "states of all ranks together are the same"
    assert 0 < shared.experts < alone.experts < alone.states
    assert estimate(1).experts == 0
    assert largest_tensor(model) == 4 * 2 * 768 * 2432 and largest_tensor(model, ep_size=2) == 2 * 2 * 768 * 2432
    assert largest_tensor(MODEL) == 6400 * 768


def test_activations_follow_batch_length_layers_and_checkpointing():
    def activations(**others: Any) -> int:
        return activation_bytes(resolve(1, **{"precision": "bf16", **others}), "cuda")

    one, ends = activations() - TABLES, 2 * 128 * 768 * 4  # the final norm's input, the loss's gradient
    per_layer = layer_activations_per_token(MODEL) * 2 + 4 * 8  # attention's log-sums in float32
    assert one == 8 * 2 * 128 * per_layer + ends
    assert activations(micro_batch_size=6) - TABLES == 3 * one
    checkpointed = activations(activation_checkpointing=True) - TABLES
    assert checkpointed == 8 * 2 * 128 * MODEL.hidden_size * 2 + ends
    deeper = dataclasses.replace(MODEL, num_hidden_layers=16)
    assert activations(model=deeper) - TABLES == 2 * one - ends


def shared(resolved: ResolvedRun, **sizes: int) -> ResolvedRun:
    """The run on more ranks, which share its sequences or layers."""
    return dataclasses.replace(resolved, train=dataclasses.replace(resolved.train, **sizes))


def test_a_shared_sequence_divides_the_activations_and_shared_layers_a_part_of_them():
    resolved = resolve(1, precision="bf16", micro_batch_size=8)
    alone = activation_bytes(resolved, "cuda")
    parts = [activation_bytes(shared(resolved, sp_size=size), "cuda") * size for size in (2, 4, 8)]
    outcome = 8 * 8 * 128 * 768 * 2  # of attention, which comes back from other ranks
    assert parts[:2] == [alone + outcome] * 2, "tables too: each rank has those of its tokens"
    assert parts[2] == alone + outcome + 2 * 8 * 8 * 128 * 384 * 2, "8 ranks repeat 4 key and value heads"
    stream = 8 * 8 * 128 * 4 * 768 * 2 + 2 * 8 * 128 * 768 * 2  # norms' inputs and outputs; the ends
    whole = stream + TABLES
    assert activation_bytes(shared(resolved, tp_size=2), "cuda") == (alone - whole) // 2 + whole


def test_states_are_divided_by_the_ranks_of_a_sequence_and_matrices_by_those_of_a_layer():
    resolved = resolve(2, precision="bf16", world_size=2)
    alone, sequence, tensor = (
        estimate_memory(shared(resolved, **sizes), "cuda") for sizes in ({}, {"sp_size": 4}, {"tp_size": 2})
    )
    assert sequence.optimizer == PARAMS // 8 * 12 and sequence.parameters == alone.parameters
    kept = 6400 * 768 + 768 + 8 * (2 * 768 + 2 * 96)  # embedding and norms
    assert tensor.parameters == (kept + (PARAMS - kept) // 2) * 2
    assert tensor.optimizer == (kept + (PARAMS - kept) // 2) // 2 * 12


def test_logits_are_bounded_by_the_chunk():
    small = dataclasses.replace(MODEL, vocab_size=1000)
    assert estimate(1, model=small, precision="fp32").logits == 8 * 2 * 128 * 1000 + 4 * 1000 * 768
    huge = dataclasses.replace(MODEL, vocab_size=10**6)
    chunk = CHUNK_LOGITS // 10**6 * 10**6
    assert estimate(1, model=huge, precision="fp32").logits == (8 + 4) * chunk + 4 * 10**6 * 768


def test_figures_for_people():
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**20, 5 * 2**40, 2**60)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "5.0 TiB", "1048576.0 TiB"
    ]  # fmt: skip
    one = MemoryEstimate(1, 2, 3, 4, 5, 6, 0, 8, 9, host=10, total=11)
    assert one.states == 6
    assert one.summary().startswith("about 11 B a rank at the peak (parameters 1 B, gradients 2 B")
    assert "gathered" not in one.summary() and one.summary().endswith("; host 10 B")


def test_the_largest_micro_batch_is_the_last_that_fits():
    resolved = resolve(1, precision="bf16")
    limit = 4 * 2**30

    def total(micro: int) -> int:
        return estimate(1, precision="bf16", micro_batch_size=micro).total

    largest = largest_micro_batch(resolved, limit)
    assert total(largest) <= limit < total(largest + 1)
    assert largest_micro_batch(resolved, 2**20) == 0


@pytest.mark.parametrize(
    ("preset", "changes"), [("quickstart", {}), ("tiny-moe", {}), ("tiny-moe", {"moe_residual": True})], ids=str
)
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("has_products", [True, False], ids=["", "widened"])
@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_activations_are_those_that_autograd_keeps(
    monkeypatch, preset, changes, bf16, has_products, activation_checkpointing
):
    # On a processor with 16-bit products and on one without, whichever this one is.
    monkeypatch.setattr(matmul, "has_fast_matmul", lambda dtype: has_products)
    config = dataclasses.replace(PRESETS[preset], vocab_size=256, num_hidden_layers=12, **changes)
    model = MiniMindForCausalLM(config).to(torch.bfloat16 if bf16 else torch.float32)
    apply_kernels(model, "cpu")
    model.set_activation_checkpointing(activation_checkpointing)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def note(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in parameters:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    tokens = torch.randint(3, 256, (2, 128))
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        output = model(tokens, tokens)
    assert output.loss is not None
    resolved = resolve(
        1, precision="bf16" if bf16 else "fp32", model=config, activation_checkpointing=activation_checkpointing
    )
    expected = sum(kept.values()) - 256 * config.hidden_size * 4  # without the gradient of the output matrix
    assert activation_bytes(resolved, "cpu") == pytest.approx(
        expected, rel=0.05 if not activation_checkpointing else 0.2
    )
