"""Cached, batched decoding against a full forward for every token."""

import dataclasses
import shutil

import pytest
import torch

from minimind.checkpoints.formats.load_model import stretch_context
from minimind.errors import UserError
from minimind.inference.decoding import Decoding
from minimind.inference.sampling import Sampler, SamplingOptions
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig

GREEDY = SamplingOptions(temperature=0.0)
SHARP = SamplingOptions(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=11)


def build_model(seed: int = 0, **changes) -> MiniMindForCausalLM:
    """A random model whose scores differ enough for an order."""
    torch.manual_seed(seed)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=300, initializer_range=0.2, **changes)
    return MiniMindForCausalLM(config).double().eval()


@pytest.fixture(scope="module")
def model() -> MiniMindForCausalLM:
    return build_model()


def random_prompt(length: int, seed: int = 0) -> list[int]:
    return torch.randint(3, 300, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


@torch.no_grad()
def recompute(model: MiniMindForCausalLM, prompt: list[int], options: SamplingOptions, count: int) -> list[int]:
    """The same continuation with a forward over everything for each token."""
    sampler = Sampler([options], [prompt], model.config.vocab_size)
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(sampler.draw(model(torch.tensor([tokens])).logits[:, -1])))
    return tokens[len(prompt) :]


def decode(model, prompts, sampling, **options) -> list[list[int]]:
    decoding = Decoding(model, prompts, sampling, **options)
    rows: list[list[int]] = [[] for _ in prompts]
    while not decoding.is_done:
        for row, token in zip(rows, decoding.step(), strict=True):
            if token is not None:
                row.append(token)
    return rows


@pytest.mark.parametrize("options", [GREEDY, SHARP])
@pytest.mark.parametrize(
    "changes",
    [{}, {"qk_norm": False}, {"num_key_value_heads": 4}, {"num_key_value_heads": 1}, {"tie_word_embeddings": False},
     {"flash_attn": False}, {"rope_scaling_factor": 4.0, "rope_original_max_position_embeddings": 16}],
)  # fmt: skip
def test_cached_decoding_equals_full_recomputation(options, changes):
    model = build_model(**changes)
    prompt = random_prompt(9)
    expected = recompute(model, prompt, options, 30)
    assert decode(model, [prompt], [options], max_new_tokens=30) == [expected]
    assert len(set(expected)) > 5  # not one token for ever, which anything would repeat


@pytest.mark.parametrize("name", PRESETS)
def test_cached_decoding_equals_full_recomputation_on_every_preset(name):
    """Two of its layers and a small vocabulary: everything else is the preset's. A ragged batch equals single runs."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[name], num_hidden_layers=2, vocab_size=300, initializer_range=0.1)
    model = MiniMindForCausalLM(config).double().eval()
    prompts = [random_prompt(length, length) for length in (1, 9, 4, 17, 2, 30, 6, 12)]
    together = decode(model, prompts, [GREEDY] * 8, max_new_tokens=6)
    for prompt, row in zip(prompts, together, strict=True):
        assert row == recompute(model, prompt, GREEDY, 6) == decode(model, [prompt], [GREEDY], max_new_tokens=6)[0]
    assert len({tuple(row) for row in together}) > 4


@pytest.mark.parametrize("options", [GREEDY, SHARP])
def test_eight_ragged_prompts_equal_eight_single_runs(model, options):
    lengths = [1, 5, 2, 17, 9, 33, 3, 12]
    prompts = [random_prompt(length, seed) for seed, length in enumerate(lengths)]
    rows = [dataclasses.replace(options, seed=None if options.seed is None else 100 + i) for i in range(8)]
    together = decode(model, prompts, rows, max_new_tokens=20)
    alone = [decode(model, [prompt], [row], max_new_tokens=20)[0] for prompt, row in zip(prompts, rows, strict=True)]
    assert together == alone
    assert len({tuple(row) for row in together}) == 8


def test_rows_end_alone_and_the_others_go_on(model):
    prompts = [random_prompt(4, seed) for seed in range(3)]
    free = decode(model, prompts, [GREEDY] * 3, max_new_tokens=12)
    stop = free[1][5]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert decode(model, prompts, [GREEDY] * 3, max_new_tokens=12, stop_token_ids=[stop]) == expected
    assert len(expected[1]) <= 5 < max(map(len, expected))

    decoding = Decoding(model, prompts, [GREEDY] * 3, max_new_tokens=12)
    rows = [decoding.step()]
    decoding.end(0)
    while not decoding.is_done:
        rows.append(decoding.step())
    assert [row[0] for row in rows] == [free[0][0]] + [None] * 11
    assert [row[1] for row in rows] == free[1] and [row[2] for row in rows] == free[2]


def test_the_cache_is_made_once(model):
    decoding = Decoding(model, [random_prompt(5)], [GREEDY], max_new_tokens=7)
    keys = decoding._cache.keys
    for _ in range(7):
        decoding.step()
    assert decoding.is_done and decoding._cache.keys is keys and decoding._cache.length == 11 < keys.shape[3]


def test_every_position_can_be_used(model):
    limit = model.config.max_position_embeddings
    prompt = random_prompt(limit - 3)
    assert len(decode(model, [prompt], [GREEDY], max_new_tokens=3)[0]) == 3
    with pytest.raises(UserError, match=f"{limit - 3} tokens and max_new_tokens 4 are beyond the model's {limit}"):
        Decoding(model, [prompt], [GREEDY], max_new_tokens=4)


@pytest.mark.parametrize(
    ("prompts", "new", "said"),
    [
        ([], 1, "empty prompt"),
        ([[3], []], 1, "empty prompt"),
        ([[300]], 1, "token id 300"),
        ([[5, -1]], 1, "token id -1"),
        ([[5]], 0, "max_new_tokens is 0"),
    ],
)
def test_prompts_that_cannot_be_continued_are_refused(model, prompts, new, said):
    with pytest.raises(UserError, match=said):
        Decoding(model, prompts, [GREEDY] * len(prompts), max_new_tokens=new)


def test_a_diverged_model_is_named_instead_of_sampled():
    model = build_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        Decoding(model, [[5]], [GREEDY], max_new_tokens=1).step()


def test_a_stretched_context_reads_beyond_the_trained_one():
    model, plain = build_model(max_position_embeddings=32), build_model(max_position_embeddings=32)
    stretch_context(model, 4.0, 32)
    prompt = random_prompt(100)
    with pytest.raises(UserError, match="32 positions"):
        Decoding(plain, [prompt], [GREEDY], max_new_tokens=20)
    configured = ModelConfig(**{**model.config.to_dict()})
    assert configured.max_position_embeddings == 128 and configured.rope_scaling_factor == 4.0
    built = MiniMindForCausalLM(configured).double().eval()
    built.load_state_dict(model.state_dict())
    decoded = decode(model, [prompt], [GREEDY], max_new_tokens=20)
    assert decoded == decode(built, [prompt], [GREEDY], max_new_tokens=20)
    assert decoded[0] == recompute(built, prompt, GREEDY, 20)
    with pytest.raises(UserError, match="rope_scaling_factor"):
        stretch_context(model, 0.5)


def test_yarn_takes_the_trained_length_that_the_model_knows(capsys):
    model = build_model(rope_original_max_position_embeddings=64)
    stretch_context(model, 16.0)
    assert model.config.trained_length == 64 and model.config.max_position_embeddings == 1024
    assert not capsys.readouterr().err
    stretch_context(model, 4.0, 2048)
    assert "2048 is taken, but this model was trained at 64" in capsys.readouterr().err
    stretch_context(build_model(), 4.0)
    assert "YaRN takes 2048; if that is wrong, give" in capsys.readouterr().err
    scaled = build_model(rope_scaling_type="linear", rope_scaling_factor=2.0)
    with pytest.raises(UserError, match="trained with linear scaling"):
        stretch_context(scaled, 4.0)


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler on a CPU")
def test_a_compiled_model_gives_the_same_tokens_from_one_compilation():
    plain, compiled = build_model(num_hidden_layers=1), build_model(num_hidden_layers=1)
    compiled.compile(dynamic=True)
    torch._dynamo.reset()
    counters = torch._dynamo.utils.counters
    counters.clear()
    for length, count in ((4, 15), (9, 5), (3, 20)):  # together no size that the model has: torch would tie the two
        prompts = [random_prompt(length)]
        expected = decode(plain, prompts, [GREEDY], max_new_tokens=count)
        assert decode(compiled, prompts, [GREEDY], max_new_tokens=count) == expected
    assert counters["stats"]["unique_graphs"] == 1
