"""The memory estimate, item by item against counts made by hand, and against what autograd really keeps."""

import dataclasses
from typing import Any

import pytest
import torch

from minimind import ds_config
from minimind.config import DataConfig, RunConfig, TrainConfig
from minimind.memory import CHUNK_LOGITS, MemoryEstimate, estimate_memory, format_bytes, layer_activations_per_token
from minimind.model import MiniMindForCausalLM
from minimind.model.config import PRESETS, ModelConfig

MODEL = PRESETS["minimind3"]
PARAMS = MODEL.num_params()


def estimate(stage: int, *, world_size: int = 1, zero: dict | None = None, model: ModelConfig = MODEL, **train: Any):
    ds = {"zero_optimization": {"stage": stage, **(zero or {})}, "data_types": {"grad_accum_dtype": "fp32"}}
    if stage == 0:
        del ds["data_types"]
    run = RunConfig(model=model, data=DataConfig(seq_len=128), train=TrainConfig(micro_batch_size=2, **train))
    resolved = ds_config.resolve(run, ds, world_size=world_size, device_type="cuda", bf16_supported=True)
    return estimate_memory(resolved, world_size)


@pytest.mark.parametrize(
    ("stage", "precision", "bytes_a_parameter"),
    [
        (0, "fp32", (4, 4, 8)),
        (0, "bf16", (4, 4, 8)),  # stage 0 autocasts: the weights stay float32
        (1, "fp32", (4, 4, 8)),
        (1, "bf16", (2, 4, 12)),
        (2, "bf16", (2, 4, 12)),
        (3, "fp16", (2, 4, 12)),
    ],
)
@pytest.mark.parametrize("world_size", [1, 4])
def test_states_are_counted_as_the_stage_partitions_them(stage, precision, bytes_a_parameter, world_size):
    found = estimate(stage, precision=precision, world_size=world_size, zero={"reduce_bucket_size": 1000})
    weights, gradients, optimizer = bytes_a_parameter
    bucket = 1000 * weights if stage >= 2 else 0
    share = PARAMS // world_size
    assert found.parameters == (share if stage == 3 else PARAMS) * weights
    assert found.gradients == (share if stage >= 2 else PARAMS) * gradients + bucket
    assert found.optimizer == (share if stage >= 1 else PARAMS) * optimizer
    assert found.host == 0 and (found.buffers > 0) == (stage == 3)


def test_offload_moves_states_to_the_host():
    on_device = estimate(3, precision="bf16")
    both = {"offload_optimizer": {"device": "cpu"}, "offload_param": {"device": "cpu"}}
    offloaded = estimate(3, precision="bf16", zero=both)
    assert offloaded.optimizer == offloaded.parameters == 0
    assert offloaded.host == on_device.optimizer + on_device.parameters
    assert offloaded.total == on_device.total - offloaded.host
    assert "; host " in offloaded.summary() and "host" not in on_device.summary()


def test_a_second_copy_inside_the_node_is_counted():
    plain = estimate(3, precision="bf16", world_size=4)
    hpz = estimate(3, precision="bf16", world_size=4, zero={"zero_hpz_partition_size": 2})
    assert hpz.buffers == plain.buffers + PARAMS // 2 * 2


def test_activations_follow_batch_length_layers_and_checkpointing():
    one = estimate(1, precision="bf16").activations
    assert one == 8 * 2 * 128 * layer_activations_per_token(MODEL) * 2
    assert estimate(1, precision="fp32").activations == 2 * one
    checkpointed = estimate(1, precision="bf16", activation_checkpointing=True).activations
    assert checkpointed == one // 8 + 8 * 2 * 128 * MODEL.hidden_size * 2
    deeper = dataclasses.replace(MODEL, num_hidden_layers=16)
    assert estimate(1, precision="bf16", model=deeper).activations == 2 * one


def test_logits_are_bounded_by_the_chunk():
    small = dataclasses.replace(MODEL, vocab_size=1000)
    gradient = 4 * 1000 * 768
    assert estimate(1, model=small).logits == 8 * 2 * 128 * 1000 + gradient
    assert estimate(1, model=dataclasses.replace(MODEL, vocab_size=10**6)).logits == 8 * CHUNK_LOGITS + 4 * 10**6 * 768


def test_the_chunk_is_the_losses_own():
    from minimind.model import loss

    assert loss._CHUNK_LOGITS == CHUNK_LOGITS


def test_figures_for_people():
    assert [format_bytes(n) for n in (0, 1023, 1536, 2**20, 5 * 2**40, 2**60)] == [
        "0 B", "1023 B", "1.5 KiB", "1.0 MiB", "5.0 TiB", "1048576.0 TiB"
    ]  # fmt: skip
    total = MemoryEstimate(1, 2, 3, 4, 5, 6, 7)
    assert total.total == 21 and total.summary().startswith("about 21 B a rank (parameters 1 B, gradients 2 B")


@pytest.mark.parametrize("activation_checkpointing", [False, True])
def test_the_activations_are_those_that_autograd_keeps(activation_checkpointing):
    config = dataclasses.replace(PRESETS["quickstart"], vocab_size=256, num_hidden_layers=24)
    model = MiniMindForCausalLM(config)
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
        loss = model(tokens, tokens).loss
    assert loss is not None
    estimated = estimate(
        1, precision="fp32", model=config, activation_checkpointing=activation_checkpointing
    ).activations
    if activation_checkpointing:  # the one block that is recomputed is not there yet
        estimated -= 2 * 128 * layer_activations_per_token(config) * 4
    assert estimated == pytest.approx(sum(kept.values()), rel=0.25)
