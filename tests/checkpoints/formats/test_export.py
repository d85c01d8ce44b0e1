"""Exports against the tools they are made for: transformers loads them without a missing key and computes the same."""

import dataclasses
import json
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import TEXTS, save_byte_level, save_qwen, save_sentencepiece
from training_runs import MODEL, flags_for, losses, rank_pool, train, weights

from minimind import errors
from minimind.checkpoints.formats.load_model import load_model
from minimind.checkpoints.safetensors import plan_shards
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.shards import open_split
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.export import main
from minimind.inference.decoding import Row, decode
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig

MOE = PRESETS["tiny-moe"]
SHAPES = {
    "qwen3": PRESETS["tiny"],
    "qwen3 yarn": dataclasses.replace(
        PRESETS["tiny"], rope_scaling_factor=4.0, rope_original_max_position_embeddings=64, head_dim=32
    ),
    "llama": dataclasses.replace(PRESETS["tiny"], qk_norm=False, num_key_value_heads=1, tie_word_embeddings=False),
    "llama yarn": dataclasses.replace(
        PRESETS["tiny"], qk_norm=False, rope_scaling_factor=8.0, rope_attention_factor=1.0,
        rope_original_max_position_embeddings=64,
    ),
    "llama llama3": dataclasses.replace(
        PRESETS["tiny"], qk_norm=False, rope_scaling_type="llama3", rope_scaling_factor=4.0, rope_beta_fast=4.0,
        rope_original_max_position_embeddings=16,
    ),
    "llama linear": dataclasses.replace(
        PRESETS["tiny"], qk_norm=False, rope_scaling_type="linear", rope_scaling_factor=2.0
    ),
    "qwen2": dataclasses.replace(PRESETS["tiny"], qk_norm=False, attention_bias=True),
    "qwen2 yarn": dataclasses.replace(
        PRESETS["tiny"], qk_norm=False, attention_bias=True, rope_scaling_factor=4.0,
        rope_original_max_position_embeddings=16,
    ),
    "qwen3_moe": dataclasses.replace(MOE, n_shared_experts=0, first_k_dense_replace=1, norm_topk_prob=False),
    "ernie4_5_moe": dataclasses.replace(
        MOE, qk_norm=False, router_bias_update_rate=0.01, first_k_dense_replace=2, n_shared_experts=2
    ),
    "ernie4_5_moe plain": dataclasses.replace(MOE, qk_norm=False, n_shared_experts=0),
    "glm4_moe": dataclasses.replace(
        MOE, scoring_func="sigmoid", routed_scaling_factor=1.7, router_bias_update_rate=0.01, first_k_dense_replace=1
    ),
    "glm4_moe plain": dataclasses.replace(MOE, scoring_func="sigmoid", qk_norm=False, norm_topk_prob=False),
}  # fmt: skip


def save_random(folder: Path, config: ModelConfig, save_tokenizer=save_sentencepiece) -> MiniMindForCausalLM:
    """A model whose every tensor matters, in our own form with a tokenizer."""
    torch.manual_seed(0)
    model = MiniMindForCausalLM(config).eval()
    # Without QK-norm ten times the queries and keys would make a softmax so sharp that float32 itself is off by 5e-4.
    gentle = ("embed_tokens", "lm_head") if config.qk_norm else ("embed_tokens", "lm_head", "q_proj", "k_proj")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() > 1:
                parameter.mul_(3 if name.split(".")[-2] in gentle else 10)
            else:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        for buffer in model.buffers():
            buffer.normal_(0, 0.1)
    model.save_pretrained(folder)
    save_tokenizer(folder)
    return model


def run_export(*flags: object) -> None:
    main([str(flag) for flag in flags])


def check_against_transformers(model: MiniMindForCausalLM, folder: Path) -> None:
    """No missing and no unexpected key; equal logits; the same 64 greedy tokens."""
    from transformers import AutoModelForCausalLM

    theirs, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not any(info.values()), info
    input_ids = torch.randint(3, 400, (1, 16), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids).logits, theirs(input_ids).logits, atol=1e-4, rtol=0)
    greedy = {"do_sample": False, "temperature": None, "top_p": None, "eos_token_id": None}
    found = theirs.generate(input_ids, max_new_tokens=64, **greedy)[0, 16:].tolist()
    row = Row(input_ids[0].tolist(), GenerationOptions(temperature=0.0, max_new_tokens=64))
    for _ in decode(model, [row]):
        pass
    assert row.new_tokens == found and len(set(found)) > 3


@pytest.mark.parametrize("name", SHAPES)
def test_transformers_computes_the_same(name, tmp_path):
    model = save_random(tmp_path / "own", dataclasses.replace(SHAPES[name], vocab_size=400))
    run_export("--checkpoint", tmp_path / "own", "--output", tmp_path / "hf", "--max-shard-size", "300KB")
    config = json.loads((tmp_path / "hf/config.json").read_text())
    assert config["model_type"] == name.split()[0]
    assert len(list((tmp_path / "hf").glob("model-*.safetensors"))) > 1
    check_against_transformers(model, tmp_path / "hf")
    # And back, bit for bit, through generation's own loader and as a folder of ours.
    back, _ = load_model(tmp_path / "hf")
    assert back.config == model.config
    run_export("--checkpoint", tmp_path / "hf", "--output", tmp_path / "again", "--format", "minimind")
    again = MiniMindForCausalLM.from_pretrained(tmp_path / "again")
    for one in (back, again):
        assert all(
            torch.equal(a, b) for a, b in zip(model.state_dict().values(), one.state_dict().values(), strict=True)
        )


@pytest.mark.parametrize("save_tokenizer", [save_sentencepiece, save_byte_level, save_qwen])
@pytest.mark.parametrize("name", [name for name in SHAPES if " " not in name])
def test_auto_tokenizer_gives_the_same_tokens_or_the_export_says_that_it_does_not(
    name, save_tokenizer, tmp_path, capsys
):
    from transformers import AutoTokenizer

    save_random(tmp_path / "own", dataclasses.replace(SHAPES[name], vocab_size=400), save_tokenizer)
    run_export("--checkpoint", tmp_path / "own", "--output", tmp_path / "hf")
    theirs, ours = AutoTokenizer.from_pretrained(tmp_path / "hf"), load_tokenizer(tmp_path / "own")
    texts = [*TEXTS, "<|im_start|>user\nHi<|im_end|>\n", "  two  blanks\n\n\n    x = 365"]
    is_same = [theirs(text)["input_ids"] for text in texts] == [ours.encode(text) for text in texts]
    assert is_same == ("AutoTokenizer and vLLM cut texts as Qwen's" not in capsys.readouterr().err)
    assert is_same or (name == "qwen2" and save_tokenizer is not save_qwen)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["minimind3", "minimind2-small", "minimind3-moe", "minimind2-moe"])
def test_published_models_as_transformers_loads_them(name, tmp_path):
    model = save_random(tmp_path / "own", PRESETS[name])
    run_export("--checkpoint", tmp_path / "own", "--output", tmp_path / "hf", "--max-shard-size", "100MB")
    check_against_transformers(model, tmp_path / "hf")


def test_models_that_transformers_saved_are_read(tmp_path):
    """A folder that no hand of ours has touched."""
    import transformers

    sizes = {"vocab_size": 400, "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "head_dim": 32}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2}
    llama3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    llama3 |= {"rope_theta": 5e5, "original_max_position_embeddings": 16}
    linear = {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 32, "mlp_only_layers": [0]}
    for number, config in enumerate(
        (
            transformers.LlamaConfig(**sizes, rope_theta=5e5),
            transformers.LlamaConfig(**sizes, rope_parameters=llama3),
            transformers.LlamaConfig(**sizes, rope_parameters=linear),
            transformers.MistralConfig(**sizes, sliding_window=None),
            transformers.Qwen2Config(**{**sizes, "head_dim": 16}, tie_word_embeddings=True),
            transformers.Qwen3Config(**sizes, tie_word_embeddings=True),
            transformers.Qwen3MoeConfig(**sizes, **experts),
        )
    ):
        torch.manual_seed(0)
        theirs = transformers.AutoModelForCausalLM.from_config(config).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.1)
        folder = tmp_path / f"{config.model_type}{number}"
        theirs.save_pretrained(folder)
        run_export("--checkpoint", folder, "--output", folder / "own", "--format", "minimind")
        ours = MiniMindForCausalLM.from_pretrained(folder / "own")
        input_ids = torch.randint(0, 400, (2, 20))
        with torch.no_grad():
            torch.testing.assert_close(ours(input_ids).logits, theirs(input_ids).logits, atol=1e-4, rtol=0)


def test_a_zero_3_checkpoint_of_two_ranks_is_that_of_one_rank(tiny_corpus, tmp_path):
    """Trained on the same data; the tokenizer of these shards is no real one, so the form is ours."""
    for pool in rank_pool(2):
        pool.run(train, flags_for(tiny_corpus, tmp_path / "two", stage=3, micro_batch_size=2))
    train(flags_for(tiny_corpus, tmp_path / "one", stage=0, micro_batch_size=4))
    for name in ("one", "two"):
        run_export("--run-dir", tmp_path / name, "--output", tmp_path / f"{name}-out", "--format", "minimind")
    one, two = (MiniMindForCausalLM.from_pretrained(tmp_path / f"{name}-out").state_dict() for name in ("one", "two"))
    assert one.keys() == two.keys()
    assert MiniMindForCausalLM.from_pretrained(tmp_path / "two-out").config.rope_original_max_position_embeddings == 16
    for name in one:
        torch.testing.assert_close(one[name], two[name], atol=1e-5, rtol=0)
    torch.testing.assert_close(weights(tmp_path / "two")["model.norm.weight"], two["model.norm.weight"])
    # An earlier step is another model.
    run_export("--run-dir", tmp_path / "one", "--step", 2, "--output", tmp_path / "early", "--format", "minimind")
    early = MiniMindForCausalLM.from_pretrained(tmp_path / "early").state_dict()
    assert not torch.equal(early["model.norm.weight"], one["model.norm.weight"])
    with pytest.raises(UserError, match="no checkpoint of step 3"):
        run_export("--run-dir", tmp_path / "one", "--step", 3, "--output", tmp_path / "x")


@pytest.mark.parametrize("form", ["hf", "minimind", "pth"])
@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_weights_are_rounded_once_and_the_routers_bias_never(form, dtype, tmp_path):
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=400)
    if form != "pth":
        config = dataclasses.replace(MOE, vocab_size=400, qk_norm=False, router_bias_update_rate=0.01)
    model = save_random(tmp_path / "own", config, save_byte_level)
    run_export("--checkpoint", tmp_path / "own", "--output", tmp_path / "out", "--format", form, "--dtype", dtype)
    loaded, file = load_model(tmp_path / "out")
    assert file.name == "tokenizer.json"
    kind = {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    for name, tensor in model.state_dict().items():
        expected = tensor if "bias" in name else tensor.to(kind)
        assert torch.equal(loaded.state_dict()[name], expected), name


def test_what_fp16_cannot_hold_is_named_and_nothing_is_left(tmp_path):
    model = save_random(tmp_path / "own", dataclasses.replace(PRESETS["tiny"], vocab_size=400))
    with torch.no_grad():
        model.model.norm.weight[3] = 1e5
    model.save_pretrained(tmp_path / "own")
    with pytest.raises(UserError, match=r"model\.norm\.weight holds 1e\+05, which overflows fp16"):
        run_export("--checkpoint", tmp_path / "own", "--output", tmp_path / "out", "--dtype", "fp16")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["own"]


def test_shards_keep_to_their_size():
    assert plan_shards({"a": 3, "b": 3, "c": 9, "d": 1, "e": 1}, 6) == [["a", "b"], ["c"], ["d", "e"]]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give either --run-dir RUN or --checkpoint PATH"),
        (["--checkpoint", "own", "--step", "3"], "step needs --run-dir"),
        (["--checkpoint", "own", "--max-shard-size", "many"], "'many' is not a size"),
        (["--checkpoint", "own", "--max-shard-size", "0"], "'0' is not a size"),
        (["--run-dir", "own"], "own is not a run"),
        (["--checkpoint", "nowhere"], "nowhere does not exist"),
        (["--checkpoint", "own", "--output", "own"], "own exists"),
        (["--checkpoint", "own", "--model", "minimind3"], "only a .pth needs a preset"),
        (["--checkpoint", "own", "--tokenizer", "nowhere"], "nowhere holds no tokenizer"),
        (["--checkpoint", "own"], "there is no tokenizer beside it"),
    ],
)
def test_a_wrong_flag_is_one_line(flags, said, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    MiniMindForCausalLM(PRESETS["tiny"]).save_pretrained("own")
    with pytest.raises(SystemExit) as caught:
        errors.run_main(lambda: main(["--output", "out", *flags]))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("error: ") and err.count("\n") == 1
    assert not Path("out").exists()


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_a_run_begins_with_the_weights_of_another_model(stage, tiny_corpus, tmp_path):
    """Also a foreign one: its first loss is that of the model itself, and its shape needs no flag."""
    config = dataclasses.replace(MOE if stage == 1 else PRESETS["tiny"], vocab_size=256, num_hidden_layers=1)
    config = dataclasses.replace(config, n_shared_experts=0) if config.use_moe else config
    if stage == 3:  # Qwen2 with Llama 3's positions
        config = dataclasses.replace(
            config, qk_norm=False, attention_bias=True, rope_scaling_type="llama3", rope_scaling_factor=4.0,
            rope_original_max_position_embeddings=8,
        )  # fmt: skip
    model = save_random(tmp_path / "own", config)
    run_export("--checkpoint", tmp_path / "own", "--output", tmp_path / "hf")
    run_export("--checkpoint", tmp_path / "hf", "--output", tmp_path / "start", "--format", "minimind")
    flags = [flag for flag in flags_for(tiny_corpus, tmp_path / "run", stage=stage, steps=2) if flag]
    for name in MODEL:
        place = flags.index("--" + name.replace("_", "-"))
        del flags[place : place + 2]
    train([*flags, "--init-from", str(tmp_path / "start"), "--lr", "1e-9"])
    batch = BatchLoader(TokenDataset(open_split(tiny_corpus, "train"), 16), 42, 4, 4).step_batches(0)[0]
    with torch.no_grad():
        expected = float(model(batch.input_ids, batch.labels).loss)
    assert losses(tmp_path / "run")[1] == pytest.approx(expected, rel=1e-5)
    elsewhere = ["--run-dir", str(tmp_path / "other"), "--dry-run"]
    with pytest.raises(UserError, match="leave out --model and the flags of its shape"):
        train([*flags, "--init-from", str(tmp_path / "start"), "--num-hidden-layers", "2", *elsewhere])
    train([*flags, "--init-from", str(tmp_path / "hf"), "--lr", "1e-9", "--run-dir", str(tmp_path / "foreign")])
    assert losses(tmp_path / "foreign")[1] == losses(tmp_path / "run")[1]
