"""The whole model: against transformers' models, through torch.compile, checkpointing, dropout, and its files."""

import ast
import dataclasses
import json
import math
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

import minimind.model
from minimind.errors import UserError
from minimind.model import PRESETS, KVCache, MiniMindForCausalLM
from minimind.model.attention_mask import segment_positions
from minimind.model.kernels.apply import apply_kernels

TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=500)


def make_model(seed=0, **changes):
    torch.manual_seed(seed)
    return MiniMindForCausalLM(dataclasses.replace(TINY, **changes))


def tokens(*shape):
    return torch.randint(3, TINY.vocab_size, shape, generator=torch.Generator().manual_seed(1))


def hugging_face_twin(name, config_class, model_class, **extra):
    """transformers' model of a preset's shape, and ours with its weights."""
    config = PRESETS[name]
    torch.manual_seed(0)
    theirs = model_class(
        config_class(
            vocab_size=config.vocab_size,
            hidden_size=config.hidden_size,
            intermediate_size=config.feed_forward_size,
            num_hidden_layers=config.num_hidden_layers,
            num_attention_heads=config.num_attention_heads,
            num_key_value_heads=config.num_key_value_heads,
            head_dim=config.head_size,
            max_position_embeddings=config.max_position_embeddings,
            rms_norm_eps=config.rms_norm_eps,
            rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
            tie_word_embeddings=config.tie_word_embeddings,
            **extra,
        )
    ).eval()
    # Norms of all ones would hide a norm in a wrong place.
    with torch.no_grad():
        for parameter_name, parameter in theirs.named_parameters():
            if "norm" in parameter_name:
                parameter.uniform_(0.5, 1.5)
    with torch.device("meta"):
        ours = MiniMindForCausalLM(config)
    ours.load_state_dict(theirs.state_dict(), assign=True)
    return theirs, ours.eval()


@torch.no_grad()
@pytest.mark.parametrize(
    ("name", "config_class", "model_class"),
    [("minimind3", Qwen3Config, Qwen3ForCausalLM), ("minimind2-small", LlamaConfig, LlamaForCausalLM)],
)
def test_logits_are_those_of_hugging_face(name, config_class, model_class):
    theirs, ours = hugging_face_twin(name, config_class, model_class)
    input_ids = tokens(2, 40)
    expected = theirs(input_ids).logits
    assert (ours(input_ids).logits - expected).abs().max() < 1e-4
    cache = KVCache(ours.config, 2, 40)
    pieces = [ours(piece, cache=cache).logits for piece in input_ids.tensor_split((20, 33, 34, 35), dim=1)]
    assert (torch.cat(pieces, dim=1) - expected).abs().max() < 1e-4
    last = ours(input_ids, logits_to_keep=3).logits
    assert last.shape == (2, 3, ours.config.vocab_size) and (last - expected[:, -3:]).abs().max() < 1e-4


@pytest.mark.parametrize("with_labels", [False, True])
def test_compiles_without_a_graph_break(with_labels):
    torch._dynamo.reset()
    model, arguments = make_model(num_hidden_layers=2), {"labels": tokens(2, 16)} if with_labels else {}
    check_compiled(torch.compile(model, fullgraph=True, backend="aot_eager"), model, arguments)


def test_compiles_around_the_attention_to_documents_whatever_their_lengths():
    """On a CPU the documents' lengths decide the shapes: new ones must neither be read wrongly nor compile anew."""
    torch._dynamo.reset()
    model = make_model(num_hidden_layers=2)
    compiled = torch.compile(model, backend="aot_eager")
    graphs = []
    for borders in ([0, 5, 16, 30, 32], [0, 1, 16, 32], [0, 16, 17, 18, 20, 32], [0, 7, 14, 16, 19, 21, 32]):
        arguments = {"labels": tokens(2, 16), "cu_seqlens": torch.tensor(borders, dtype=torch.int32)}
        arguments["position_ids"] = segment_positions(arguments["cu_seqlens"], 32).view(2, 16)
        check_compiled(compiled, model, arguments)
        graphs.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert graphs[0] > 0 and graphs[1:] == [graphs[1]] * 3


def check_compiled(compiled, model, arguments):
    """The losses or logits of a compiled model, and their gradients, are the plain one's."""
    input_ids, key = tokens(2, 16), "loss" if "labels" in arguments else "logits"
    found, wanted = (getattr(each(input_ids, **arguments), key) for each in (compiled, model))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)
    parameters = list(model.parameters())
    wanted_grads = torch.autograd.grad(wanted.sum(), parameters)
    for left, right in zip(torch.autograd.grad(found.sum(), parameters), wanted_grads, strict=True):
        assert (left - right).norm() < 1e-4 * right.norm()


def test_checkpointing_recomputes_the_same_gradients_dropout_included():
    model, input_ids, labels = make_model(dropout=0.3, attention_dropout=0.3), tokens(2, 12), tokens(2, 12)
    grads = []
    for enabled in (False, True):
        model.set_activation_checkpointing(enabled)
        torch.manual_seed(5)
        grads.append(torch.autograd.grad(model(input_ids, labels).loss, list(model.parameters())))
    for left, right in zip(*grads, strict=True):
        torch.testing.assert_close(left, right)


def test_dropout_acts_in_training_only():
    model, input_ids = make_model(dropout=0.5), tokens(1, 8)
    assert not torch.equal(model(input_ids).logits, model(input_ids).logits)
    model.eval()
    assert torch.equal(model(input_ids).logits, model(input_ids).logits)


def test_fresh_weights_follow_their_range_and_the_seed():
    model = make_model()
    state = model.state_dict()
    assert state["model.embed_tokens.weight"].std().item() == pytest.approx(0.02, rel=0.02)
    into_residual = 0.02 / math.sqrt(2 * TINY.num_hidden_layers)
    for name, std in {
        "self_attn.q_proj": 0.02,
        "self_attn.o_proj": into_residual,
        "mlp.down_proj": into_residual,
    }.items():
        assert state[f"model.layers.1.{name}.weight"].std().item() == pytest.approx(std, rel=0.05)
    assert all((value == 1).all() for name, value in state.items() if "norm" in name)
    assert all(torch.equal(value, state[name]) for name, value in make_model().state_dict().items())
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = make_model().state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(torch.equal(value, state[name].bfloat16()) for name, value in rounded.items())
    # The loss of a fresh model is that of a guess.
    labels = torch.randint(0, TINY.vocab_size, (2, 64))
    assert model(tokens(2, 64), labels).loss.item() == pytest.approx(math.log(TINY.vocab_size), rel=0.02)


def test_runs_in_bfloat16_and_under_autocast_close_to_float32():
    model, input_ids, labels = make_model(), tokens(2, 12), tokens(2, 12)
    exact = model(input_ids, labels).loss
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(input_ids, labels).loss
    mixed.backward()
    assert all(parameter.grad.dtype == torch.float32 for parameter in model.parameters())
    torch.testing.assert_close(mixed, exact, rtol=1e-2, atol=0)
    torch.testing.assert_close(model.bfloat16()(input_ids, labels).loss, exact, rtol=1e-2, atol=0)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_folder_gives_the_same_model_back(tmp_path, tied, dtype):
    model = make_model(tie_word_embeddings=tied).to(dtype).eval()
    model.save_pretrained(tmp_path / "deep" / "er")
    assert sorted(path.name for path in (tmp_path / "deep" / "er").iterdir()) == ["config.json", "model.safetensors"]
    apply_kernels(model, "cpu")  # as every model that is loaded has them
    loaded = MiniMindForCausalLM.from_pretrained(tmp_path / "deep" / "er")
    assert loaded.config == model.config and not loaded.training
    assert (loaded.lm_head.weight is loaded.model.embed_tokens.weight) == tied
    assert all(torch.equal(value, loaded.state_dict()[name]) for name, value in model.state_dict().items())
    assert torch.equal(loaded(tokens(1, 8)).logits, model(tokens(1, 8)).logits)
    assert MiniMindForCausalLM.from_pretrained(tmp_path / "deep" / "er", dtype=torch.float64).lm_head.weight.dtype == (
        torch.float64
    )
    loaded.train()(tokens(1, 8), tokens(1, 8)).loss.backward()


def edit_config(folder, **changes):
    values = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**values, **changes}))


def edit_weights(folder, edit):
    tensors = load_file(folder / "model.safetensors")
    edit(tensors)
    save_file(tensors, folder / "model.safetensors")


DAMAGES = {
    "no config": (lambda folder: (folder / "config.json").unlink(), "config.json"),
    "no JSON": (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
    "JSON of another shape": (lambda folder: (folder / "config.json").write_text("[]"), "expected a JSON object"),
    "another model": (lambda folder: edit_config(folder, model_type="gpt2"), "model_type 'gpt2' is not one of"),
    "unknown field": (lambda folder: edit_config(folder, layers=3), "layers"),
    "impossible field": (lambda folder: edit_config(folder, num_key_value_heads=3), "num_key_value_heads"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
    "empty weights": (lambda folder: (folder / "model.safetensors").write_bytes(b""), "damaged"),
    "weights cut short": (
        lambda folder: (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-100]),
        "damaged",
    ),
    "weights of another kind": (lambda folder: (folder / "model.safetensors").write_bytes(b"x" * 1000), "damaged"),
    "another width": (lambda folder: edit_config(folder, hidden_size=128, intermediate_size=256), "is ("),
    "a layer missing": (
        lambda folder: edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight")),
        "model.norm.weight",
    ),
    "a layer too many": (lambda folder: edit_config(folder, num_hidden_layers=3), "no place"),
}


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES.keys())
def test_a_damaged_folder_is_one_clear_line(tmp_path, damage, words):
    make_model().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(UserError) as caught:
        MiniMindForCausalLM.from_pretrained(tmp_path)
    assert words in str(caught.value) and "\n" not in str(caught.value)


def test_a_folder_that_cannot_be_written_is_a_user_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="could not be written"):
        make_model().save_pretrained(tmp_path / "file")


def test_model_imports_plain_torch_alone():
    folder = Path(minimind.model.__file__).parent
    for path in folder.glob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            for name in names:
                assert not name.startswith(("deepspeed", "transformers", "argparse", "torch.distributed")), (path, name)
                if name.startswith("minimind"):
                    allowed = ("minimind.model", "minimind.errors", "minimind.schema", "minimind.files")
                    # Rotary angles ask whether the device has float64.
                    allowed += ("minimind.accelerator",) if path.name == "rope.py" else ()
                    # The bare package is lazy names alone.
                    assert name == "minimind" or name.startswith(allowed), (path, name)


def test_documents_and_cache_do_not_mix():
    model = make_model()
    with pytest.raises(ValueError, match="cu_seqlens"):
        model(tokens(1, 4), cu_seqlens=torch.tensor([0, 4]), cache=KVCache(TINY, 1, 8))
