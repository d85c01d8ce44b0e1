"""Matrices laid out for decoding: by columns the same answers, as 8-bit integers nearly the same."""

import copy
import dataclasses

import pytest
import torch
import torch.nn.functional as F

from minimind.errors import UserError
from minimind.inference.decoding import Row, decode
from minimind.inference.device import choose_device
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM
from minimind.model.kernels.packed_weights import (
    Int8Linear,
    PackedHead,
    PackedLinear,
    can_pack,
    lay_out_by_columns,
    prepare_decoding,
    quantize_int8,
)

SHAPES = {
    "tied": PRESETS["tiny"],
    "untied": dataclasses.replace(PRESETS["tiny"], tie_word_embeddings=False),
    "experts": PRESETS["tiny-moe"],
    "no QK-norm": dataclasses.replace(PRESETS["tiny"], qk_norm=False, num_key_value_heads=4),
    "biases": dataclasses.replace(PRESETS["tiny"], qk_norm=False, attention_bias=True),
    "residual experts": dataclasses.replace(PRESETS["tiny-moe"], moe_residual=True),
}


def decode_greedily(model: MiniMindForCausalLM, prompts: list[list[int]], count: int) -> list[list[int]]:
    rows = [Row(prompt, GenerationOptions(temperature=0.0, max_new_tokens=count)) for prompt in prompts]
    for _ in decode(model, rows):
        pass
    return [row.new_tokens for row in rows]


def build(name: str, dtype: torch.dtype = torch.float32) -> MiniMindForCausalLM:
    torch.manual_seed(0)
    config = dataclasses.replace(SHAPES[name], vocab_size=320, initializer_range=0.1)
    model = MiniMindForCausalLM(config)
    for layer in model.model.layers if config.attention_bias else ():
        for projection in (layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj):
            torch.nn.init.normal_(projection.bias)
    return model.to(dtype).eval()


@pytest.mark.parametrize("name", SHAPES)
def test_by_columns_nothing_changes_but_the_layout(name):
    model, input_ids = build(name), torch.randint(0, 320, (2, 30))
    fast = copy.deepcopy(model)
    lay_out_by_columns(fast)
    assert fast.model.layers[0].self_attn.q_proj.weight.stride() == (1, 64)
    assert fast.model.embed_tokens.weight.is_contiguous()
    for (key, before), after in zip(model.state_dict().items(), fast.state_dict().values(), strict=True):
        assert torch.equal(before, after), key
    with torch.no_grad():
        torch.testing.assert_close(fast(input_ids).logits, model(input_ids).logits, atol=1e-5, rtol=0)
    rows = []
    for one in (model, fast):
        rows.append(decode_greedily(one, input_ids.tolist(), 20))
    assert rows[0] == rows[1]


@pytest.mark.parametrize("name", SHAPES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_nothing_changes_but_the_layout(name, dtype):
    model = build(name, dtype)
    if not can_pack(model.lm_head.weight):
        pytest.skip("no oneDNN for this type here")
    input_ids = torch.randint(0, 320, (2, 30), generator=torch.Generator().manual_seed(1))
    fast = copy.deepcopy(model)
    prepare_decoding(fast, int8=False)
    assert isinstance(fast.model.layers[0].self_attn.qkv_proj, PackedLinear) and isinstance(fast.lm_head, PackedHead)
    for layer in fast.model.layers:
        assert not hasattr(layer.mlp, "gate") or type(layer.mlp.gate) is type(model.model.layers[0].mlp.gate)
    with torch.no_grad():
        expected, found = (one(input_ids).logits.float() for one in (model, fast))
        if dtype == torch.float32:
            assert (found - expected).norm() < 1e-5 * expected.norm()
        else:  # rounded elsewhere, and no worse
            exact = copy.deepcopy(model).float()(input_ids).logits
            assert (found - exact).norm() < 1.2 * (expected - exact).norm() < 0.2 * exact.norm()
        losses = [one(input_ids[:, :-1], input_ids[:, 1:]).loss for one in (model, fast)]
        torch.testing.assert_close(losses[1].float(), losses[0].float(), rtol=1e-2, atol=0)
    if dtype == torch.float32:
        rows = []
        for one in (model, fast):
            rows.append(decode_greedily(one, input_ids.tolist(), 20))
        assert rows[0] == rows[1]


def test_a_model_that_is_to_be_compiled_is_laid_out_by_columns():
    model = build("tied")
    prepare_decoding(model, int8=False, compiled=True)
    assert model.model.layers[0].self_attn.q_proj.weight.stride() == (1, 64)


@pytest.mark.parametrize("rows", [1, 7, 64])
def test_an_8_bit_matrix_is_off_by_half_a_step_at_most(rows):
    linear = torch.nn.Linear(96, 64, bias=False).bfloat16()
    int8, x = Int8Linear(linear), torch.randn(2, rows, 96).bfloat16()
    restored = int8.quantized.float() * int8.scale.float()[:, None]
    step = linear.weight.float().abs().amax(dim=1, keepdim=True) / 127
    assert ((restored - linear.weight.float()).abs() <= 0.5 * step + 0.01 * linear.weight.float().abs()).all()
    torch.testing.assert_close(int8(x).float(), x.float() @ restored.t(), atol=0.03, rtol=0.02)


@pytest.mark.parametrize("name", SHAPES)
def test_an_8_bit_model_says_nearly_the_same(name):
    model = build(name, torch.bfloat16)
    int8 = copy.deepcopy(model)
    quantize_int8(int8)
    input_ids, labels = torch.randint(0, 320, (2, 30)), torch.randint(0, 320, (2, 30))
    with torch.no_grad():
        expected, found = model(input_ids).logits.float(), int8(input_ids).logits.float()
        assert F.cosine_similarity(found.flatten(), expected.flatten(), dim=0) > 0.995  # a router near a tie may turn
        for reduction in ("mean", "sum"):
            loss = int8(input_ids, labels, loss_reduction=reduction).loss
            plain = F.cross_entropy(found.flatten(0, 1), labels.flatten(), reduction=reduction)
            torch.testing.assert_close(loss, plain)
    assert not any(key.endswith("q_proj") for key, _ in int8.named_modules())
    assert len(decode_greedily(int8, [[1, 2, 3]], 5)[0]) == 5


def test_where_8_bit_has_no_kernel_it_is_refused():
    assert choose_device(None, None, int8=True) == (torch.device("cpu"), torch.bfloat16)
    with pytest.raises(UserError, match="int8 works on a CPU in bf16 alone"):
        choose_device("cpu", "fp32", int8=True)
