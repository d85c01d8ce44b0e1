"""The `.pth` of jingyaogong/minimind, both forms: names and shapes built here by hand, and, given a checkout of theirs
(MINIMIND_CHECKOUT=DIR, with its history), their own classes."""

import dataclasses
import importlib.util
import os
import subprocess
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import save_byte_level

from minimind.checkpoints.formats.load_model import build_from_source, load_model
from minimind.checkpoints.formats.pth import choose_form
from minimind.checkpoints.formats.source import open_source
from minimind.errors import UserError
from minimind.export import main
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig

# The last commit of theirs with the older form.
OLDER_COMMIT = "101d7df~1"
TINY = ModelConfig(vocab_size=400, hidden_size=64, num_hidden_layers=2, intermediate_size=96)
PRESENT = dataclasses.replace(TINY, use_moe=True)
OLDER = dataclasses.replace(
    TINY, qk_norm=False, rms_norm_eps=1e-5, num_key_value_heads=2, use_moe=True, num_experts_per_tok=2,
    n_shared_experts=2, seq_aux=True, router_aux_loss_coef=0.01,
)  # fmt: skip
FORMS = {
    "present": TINY,
    "present experts": PRESENT,
    "older": dataclasses.replace(TINY, qk_norm=False, rms_norm_eps=1e-5, num_key_value_heads=2),
    "older experts": OLDER,
}


def their_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Every tensor of a file of theirs."""
    width, heads, kv_heads, size = config.hidden_size, 8, config.num_key_value_heads, config.head_size
    inner = config.feed_forward_size
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (config.vocab_size, width)}

    def feed_forward(prefix: str) -> None:
        shapes[f"{prefix}.gate_proj.weight"] = (inner, width)
        shapes[f"{prefix}.down_proj.weight"] = (width, inner)
        shapes[f"{prefix}.up_proj.weight"] = (inner, width)

    for layer in range(config.num_hidden_layers):
        here = f"model.layers.{layer}"
        shapes[f"{here}.self_attn.q_proj.weight"] = (heads * size, width)
        shapes[f"{here}.self_attn.k_proj.weight"] = (kv_heads * size, width)
        shapes[f"{here}.self_attn.v_proj.weight"] = (kv_heads * size, width)
        shapes[f"{here}.self_attn.o_proj.weight"] = (width, heads * size)
        if config.qk_norm:
            shapes[f"{here}.self_attn.q_norm.weight"] = shapes[f"{here}.self_attn.k_norm.weight"] = (size,)
        shapes[f"{here}.input_layernorm.weight"] = shapes[f"{here}.post_attention_layernorm.weight"] = (width,)
        if not config.use_moe:
            feed_forward(f"{here}.mlp")
            continue
        shapes[f"{here}.mlp.gate.weight"] = (config.num_experts, width)
        for expert in range(config.num_experts):
            feed_forward(f"{here}.mlp.experts.{expert}")
        for expert in range(config.n_shared_experts):
            feed_forward(f"{here}.mlp.shared_experts.{expert}")
    shapes["model.norm.weight"] = (width,)
    shapes["lm_head.weight"] = (config.vocab_size, width)
    return shapes


def their_tensors(config: ModelConfig) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(shape, generator=generator) / 4 for name, shape in their_shapes(config).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    return tensors


@pytest.mark.parametrize("form", FORMS)
def test_every_tensor_finds_its_place_and_the_shapes_tell_the_config(form, tmp_path):
    config, tensors = FORMS[form], their_tensors(FORMS[form])
    torch.save({**tensors, "model.freqs_cos": torch.zeros(3)}, tmp_path / "pretrain_64.pth")
    source = open_source(tmp_path / "pretrain_64.pth")
    assert source.config == config
    model = build_from_source(source).state_dict()
    moved = 0
    for layer in range(2 if config.use_moe else 0):
        here = f"model.layers.{layer}.mlp"
        for expert in range(4):
            gate_up = torch.cat([tensors[f"{here}.experts.{expert}.{name}_proj.weight"] for name in ("gate", "up")])
            assert torch.equal(model[f"{here}.experts.gate_up_proj"][expert], gate_up)
            down = tensors[f"{here}.experts.{expert}.down_proj.weight"]
            assert torch.equal(model[f"{here}.experts.down_proj"][expert], down)
            moved += 3
        if config.n_shared_experts:
            for name, dim in (("gate", 0), ("up", 0), ("down", 1)):
                both = [tensors[f"{here}.shared_experts.{expert}.{name}_proj.weight"] for expert in range(2)]
                assert torch.equal(model[f"{here}.shared_experts.{name}_proj.weight"], torch.cat(both, dim))
                moved += 2
    same = [name for name in tensors if name in model and torch.equal(model[name], tensors[name])]
    assert len(same) + moved == len(tensors)


@pytest.mark.parametrize("form", FORMS)
def test_a_file_is_written_as_they_write_it(form, tmp_path):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(FORMS[form], dropout=0.1)).eval()
    model.save_pretrained(tmp_path / "own")
    save_byte_level(tmp_path / "own")
    flags = ["--checkpoint", str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--format", "pth"]
    main([*flags, "--dtype", "fp32"])
    name = "pretrain_64_moe.pth" if model.config.use_moe else "pretrain_64.pth"
    tensors = torch.load(tmp_path / "out" / name, weights_only=True)
    assert {key: tuple(tensor.shape) for key, tensor in tensors.items()} == their_shapes(model.config)
    for place in (tmp_path / "out", tmp_path / "out" / name):
        back, tokenizer_file = load_model(place)
        assert back.config == model.config and tokenizer_file.name == "tokenizer.json"
        for key, tensor in model.state_dict().items():
            assert torch.equal(back.state_dict()[key], tensor), key
    # Without the config beside it, what shapes do not tell comes from the published models.
    (tmp_path / "out" / name).with_suffix(".json").unlink()
    assert load_model(tmp_path / "out")[0].config == FORMS[form]


def test_a_preset_says_what_shapes_do_not(tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], qk_norm=False)
    MiniMindForCausalLM(config).save_pretrained(tmp_path / "own")
    main(["--checkpoint", str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--format", "pth"])
    (path,) = (tmp_path / "out").glob("*.pth")
    path.with_suffix(".json").unlink()
    assert open_source(path).config.num_attention_heads == 8
    assert open_source(path, PRESETS["tiny"]).config == config


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"n_shared_experts": 1}, "shared experts together with qk_norm"),
        ({"scoring_func": "sigmoid"}, "scoring_func='sigmoid'"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace=1"),
        ({"moe_residual": True}, "moe_residual"),
        ({"rope_scaling_factor": 2.0}, "rope_scaling_factor=2.0"),
        ({"qk_norm": False}, "norm_topk_prob with one expert a token"),
        ({"qk_norm": False, "num_experts_per_tok": 2, "moe_intermediate_size": 32}, "moe_intermediate_size"),
    ],
)
def test_what_their_code_has_not_is_refused(changes, said):
    with pytest.raises(UserError, match=said):
        choose_form(dataclasses.replace(PRESENT, **changes))


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "model.norm.weight of the model .* is missing"),
        (lambda tensors: tensors.pop("model.embed_tokens.weight"), "matrix model.embed_tokens.weight is missing"),
        (lambda tensors: tensors.update(more=torch.zeros(2)), "tensor more has no place"),
        (lambda tensors: tensors.update(step=3), "step is not a floating-point tensor"),
        (lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}), r"model.norm.weight is \(3,\)"),
        (lambda tensors: tensors.clear(), "holds no tensors"),
    ],
)
def test_what_is_no_model_of_theirs_is_named(change, said, tmp_path):
    tensors = their_tensors(PRESENT)
    change(tensors)
    torch.save(tensors, tmp_path / "a.pth")
    with pytest.raises(UserError, match=said):
        open_source(tmp_path / "a.pth")


def their_module(form: str, tmp_path: Path):
    """`model_minimind.py` of a checkout, of its present state or of the commit with the older form."""
    checkout = os.environ.get("MINIMIND_CHECKOUT")
    if not checkout:
        pytest.skip("MINIMIND_CHECKOUT names no checkout of jingyaogong/minimind")
    revision = OLDER_COMMIT if form.startswith("older") else "HEAD"
    shown = subprocess.run(
        ["git", "-C", checkout, "show", f"{revision}:model/model_minimind.py"], capture_output=True, text=True
    )
    if shown.returncode:
        pytest.skip(f"the checkout has no {revision}: {shown.stderr.strip()}")
    file = tmp_path / f"their_{form.split()[0]}.py"
    file.write_text(shown.stdout, encoding="utf-8")
    spec = importlib.util.spec_from_file_location(file.stem, file)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name"),
    [
        ("present", "minimind3"),
        ("present experts", "minimind3-moe"),
        ("older", "minimind2-small"),
        ("older experts", "minimind2-moe"),
    ],
)
def test_their_classes_give_the_same_logits(form, name, tmp_path):
    module, ours = their_module(form, tmp_path), PRESETS[name]
    settings = {"hidden_size": ours.hidden_size, "num_hidden_layers": ours.num_hidden_layers, "use_moe": ours.use_moe}
    torch.manual_seed(0)
    theirs = module.MiniMindForCausalLM(module.MiniMindConfig(**settings)).eval()
    with torch.no_grad():
        for parameter in theirs.parameters():
            parameter.mul_(1 + torch.rand_like(parameter))  # norms that are not 1, routers that decide
    torch.save(theirs.state_dict(), tmp_path / "theirs.pth")
    source = open_source(tmp_path / "theirs.pth")
    assert source.config == ours
    model = build_from_source(source)
    input_ids = torch.randint(0, 6400, (2, 128))
    with torch.no_grad():
        found, expected = model(input_ids).logits, theirs(input_ids).logits
    difference, largest = float((found - expected).abs().max()), float(expected.abs().max())
    print(f"{name}: largest difference {difference:.2e} of logits up to {largest:.2f}")
    assert difference < 1e-4 < largest
    # And the way back: their class takes our file without a word.
    model.save_pretrained(tmp_path / "own")
    save_byte_level(tmp_path / "own")
    main(["--checkpoint", str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--format", "pth"])
    (path,) = (tmp_path / "out").glob("*.pth")
    other = module.MiniMindForCausalLM(module.MiniMindConfig(**settings)).eval()
    other.load_state_dict(torch.load(path, weights_only=True), strict=True)
    with torch.no_grad():
        assert torch.equal(other(input_ids).logits, expected)
