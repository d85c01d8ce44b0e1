"""GGUF files, read back as llama.cpp reads them: where everything lies, and what is refused."""

import dataclasses
import json
import struct
import urllib.request
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers_for_tests import save_byte_level, save_sentencepiece

from minimind.checkpoints.formats.load_model import load_model
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.export import main
from minimind.inference.decoding import Row, decode
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig

TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=400)
LLAMA = dataclasses.replace(TINY, qk_norm=False, tie_word_embeddings=False)
EXPERTS = dataclasses.replace(PRESETS["tiny-moe"], vocab_size=400, n_shared_experts=0)
SHAPES = {
    "qwen3": TINY,
    "qwen3 yarn": dataclasses.replace(TINY, rope_scaling_factor=4.0, rope_original_max_position_embeddings=16),
    "llama": LLAMA,
    "llama llama3": dataclasses.replace(
        LLAMA, rope_scaling_type="llama3", rope_scaling_factor=4.0, rope_beta_fast=4.0,
        rope_original_max_position_embeddings=16,
    ),
    "llama linear": dataclasses.replace(LLAMA, rope_scaling_type="linear", rope_scaling_factor=2.0),
    "qwen2": dataclasses.replace(TINY, qk_norm=False, attention_bias=True),
    "qwen3moe": EXPERTS,
}  # fmt: skip


def export(config: ModelConfig, tmp_path: Path, save_tokenizer=save_sentencepiece) -> tuple[MiniMindForCausalLM, Path]:
    """A random model whose greedy text is no repetition, and its file."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(dataclasses.replace(config, initializer_range=0.2)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(tmp_path / "own")
    save_tokenizer(tmp_path / "own")
    main(["--checkpoint", str(tmp_path / "own"), "--output", str(tmp_path / "out"), "--format", "gguf"])
    (path,) = (tmp_path / "out").iterdir()
    return model, path


def read_gguf(path: Path) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Metadata and float32 tensors of a file."""
    data, place = path.read_bytes(), 4

    def take(form: str) -> Any:
        nonlocal place
        (value,) = struct.unpack_from("<" + form, data, place)
        place += struct.calcsize("<" + form)
        return value

    def take_string() -> str:
        nonlocal place
        length = take("Q")
        place += length
        return data[place - length : place].decode()

    def take_value(kind: int) -> Any:
        if kind == 9:
            kind, count = take("I"), take("Q")
            return [take_value(kind) for _ in range(count)]
        return take_string() if kind == 8 else take({4: "I", 5: "i", 6: "f", 7: "?"}[kind])

    assert data[:4] == b"GGUF" and take("I") == 3
    num_tensors, num_fields = take("Q"), take("Q")
    fields = {take_string(): take_value(take("I")) for _ in range(num_fields)}
    places = {}
    for _ in range(num_tensors):
        name = take_string()
        sizes = [take("Q") for _ in range(take("I"))][::-1]
        assert take("I") == 0
        places[name] = sizes, take("Q")
    start = place + -place % 32
    tensors = {}
    for name, (sizes, offset) in places.items():
        values = np.frombuffer(data, np.float32, int(np.prod(sizes)), start + offset)
        tensors[name] = torch.from_numpy(values.copy()).view(sizes)
    return fields, tensors


@pytest.mark.parametrize("name", SHAPES)
def test_every_tensor_and_size_is_where_llama_cpp_looks(name, tmp_path):
    model, path = export(SHAPES[name], tmp_path)
    (fields, tensors), config, state = read_gguf(path), model.config, model.state_dict()
    kind = fields["general.architecture"]
    assert kind == name.split()[0] and fields[f"{kind}.block_count"] == 4 and fields[f"{kind}.vocab_size"] == 400
    assert fields["tokenizer.ggml.add_space_prefix"] is False and fields["tokenizer.ggml.add_bos_token"] is False
    assert len(fields["tokenizer.ggml.tokens"]) == len(fields["tokenizer.ggml.scores"]) == 400
    factors = tensors.pop("rope_freqs.weight", None)
    assert (factors is None) == ("llama3" not in name) and (factors is None or factors[-1] == pytest.approx(4))
    assert fields.get(f"{kind}.rope.scaling.type") == next((way for way in ("yarn", "linear") if way in name), None)
    assert sum(tensor.numel() for tensor in tensors.values()) == config.num_params()
    assert torch.equal(tensors["token_embd.weight"], state["model.embed_tokens.weight"])
    assert torch.equal(tensors["blk.3.attn_v.weight"], state["model.layers.3.self_attn.v_proj.weight"])
    queries, theirs = state["model.layers.1.self_attn.q_proj.weight"], tensors["blk.1.attn_q.weight"]
    if kind == "llama":  # the two rows of a rotary pair lie side by side
        assert torch.equal(theirs[2 * 3 + 1], queries[8 + 3]) and not torch.equal(theirs, queries)
    else:
        assert torch.equal(theirs, queries)
    if config.use_moe:
        gate, up = state["model.layers.2.mlp.experts.gate_up_proj"].chunk(2, dim=1)
        assert torch.equal(tensors["blk.2.ffn_gate_exps.weight"], gate)
        assert torch.equal(tensors["blk.2.ffn_up_exps.weight"], up)


def test_byte_level_tokenizers_come_with_their_merges(tmp_path):
    _, path = export(TINY, tmp_path, save_byte_level)
    fields, _ = read_gguf(path)
    content = json.loads((tmp_path / "own/tokenizer.json").read_text())
    assert fields["tokenizer.ggml.model"] == "gpt2" and fields["tokenizer.ggml.pre"] == "gpt-2"
    assert len(fields["tokenizer.ggml.merges"]) == len(content["model"]["merges"])
    content["pre_tokenizer"] = {"type": "Whitespace"}
    (tmp_path / "own/tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="byte-level BPE"):
        main(["--checkpoint", str(tmp_path / "own"), "--output", str(tmp_path / "no"), "--format", "gguf"])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"norm_topk_prob": False}, "norm_topk_prob=false"),
        ({"first_k_dense_replace": 1}, "first_k_dense_replace=1"),
        ({"qk_norm": False}, "ernie4_5_moe"),
        ({"rope_scaling_type": "llama3", "rope_scaling_factor": 2.0}, "rope_scaling_type='llama3' in qwen3_moe"),
    ],
)
def test_what_llama_cpp_computes_in_another_way_is_refused(changes, said, tmp_path):
    with pytest.raises(UserError, match=said):
        export(dataclasses.replace(EXPERTS, **changes), tmp_path)
    assert not (tmp_path / "out").exists()


TEXTS = ["Once upon a time", " a blank before", "two\n\nlines\n", "你好，世界。再见", "Привет, мир", "x\ty  z", "😀 é",
         "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]  # fmt: skip


@pytest.mark.parametrize("save_tokenizer", [save_sentencepiece, save_byte_level])
@pytest.mark.parametrize("name", SHAPES)
def test_llama_cpp_reads_the_same_tokens_and_writes_the_same_text(name, save_tokenizer, tmp_path):
    llama = pytest.importorskip("xllamacpp", reason="llama.cpp's engine is not installed (pip install xllamacpp)")
    _, path = export(SHAPES[name], tmp_path, save_tokenizer)
    model, tokenizer = load_model(tmp_path / "own")[0], load_tokenizer(tmp_path / "own")
    settings = llama.CommonParams()
    settings.model.path, settings.n_ctx, settings.n_parallel, settings.port = str(path), 512, 1, 0
    settings.cache_type_k = settings.cache_type_v = llama.ggml_type.GGML_TYPE_F32  # as ours
    settings.flash_attn_type = llama.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
    server = llama.Server(settings)

    def ask(route: str, **content: Any) -> Any:
        request = urllib.request.Request(server.listening_address + route, json.dumps(content).encode())
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)["tokens"]

    for text in TEXTS:
        ids = tokenizer.encode(text)
        assert ask("/tokenize", content=text, add_special=True, parse_special=True) == ids, text
        row = Row(ids, GenerationOptions(temperature=0.0, max_new_tokens=16))
        for _ in decode(model, [row]):
            pass
        found = ask("/completion", prompt=text, n_predict=16, temperature=0, return_tokens=True, cache_prompt=False)
        assert found == row.new_tokens[: len(found)] and found, text
