"""Cached, batched decoding against a full forward for every token."""

import dataclasses
import shutil
from random import Random

import pytest
import torch

from minimind.checkpoints.formats.load_model import stretch_context
from minimind.errors import UserError
from minimind.inference.decoding import Decoding, Row, decode
from minimind.inference.sampling import GenerationOptions, draw
from minimind.model import PRESETS, MiniMindForCausalLM, ModelConfig

GREEDY = GenerationOptions(temperature=0.0)
SHARP = GenerationOptions(temperature=0.7, top_k=50, top_p=0.9, repetition_penalty=1.3, seed=11)


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
def recompute(model: MiniMindForCausalLM, prompt: list[int], options: GenerationOptions, count: int) -> list[int]:
    """The same continuation with a forward over everything for each token."""
    random, tokens = Random(options.seed), list(prompt)
    for _ in range(count):
        logits = model(torch.tensor([tokens])).logits[:, -1]
        tokens.append(int(draw(logits, [options], [random], [tokens], model.config.vocab_size)))
    return tokens[len(prompt) :]


def make_rows(prompts, sampling, max_new_tokens: int, stop_token_ids=()) -> list[Row]:
    options = [dataclasses.replace(row, max_new_tokens=max_new_tokens) for row in sampling]
    return [Row(*pair, stop_token_ids) for pair in zip(prompts, options, strict=True)]


def run(model, prompts, sampling, **options) -> list[list[int]]:
    rows = make_rows(prompts, sampling, **options)
    for _ in decode(model, rows):
        pass
    return [row.new_tokens for row in rows]


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
    assert run(model, [prompt], [options], max_new_tokens=30) == [expected]
    assert len(set(expected)) > 5  # not one token for ever, which anything would repeat


@pytest.mark.parametrize("name", PRESETS)
def test_cached_decoding_equals_full_recomputation_on_every_preset(name):
    """Two of its layers and a small vocabulary: everything else is the preset's. A ragged batch equals single runs."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[name], num_hidden_layers=2, vocab_size=300, initializer_range=0.1)
    model = MiniMindForCausalLM(config).double().eval()
    prompts = [random_prompt(length, length) for length in (1, 9, 4, 17, 2, 30, 6, 12)]
    together = run(model, prompts, [GREEDY] * 8, max_new_tokens=6)
    for prompt, row in zip(prompts, together, strict=True):
        assert row == recompute(model, prompt, GREEDY, 6) == run(model, [prompt], [GREEDY], max_new_tokens=6)[0]
    assert len({tuple(row) for row in together}) > 4


@pytest.mark.parametrize("options", [GREEDY, SHARP])
def test_eight_ragged_prompts_equal_eight_single_runs(model, options):
    lengths = [1, 5, 2, 17, 9, 33, 3, 12]
    prompts = [random_prompt(length, seed) for seed, length in enumerate(lengths)]
    rows = [dataclasses.replace(options, seed=None if options.seed is None else 100 + i) for i in range(8)]
    together = run(model, prompts, rows, max_new_tokens=20)
    alone = [run(model, [prompt], [row], max_new_tokens=20)[0] for prompt, row in zip(prompts, rows, strict=True)]
    assert together == alone
    assert len({tuple(row) for row in together}) == 8


def test_rows_end_alone_and_the_others_go_on(model):
    prompts = [random_prompt(4, seed) for seed in range(3)]
    free = run(model, prompts, [GREEDY] * 3, max_new_tokens=12)
    stop = free[1][5]
    expected = [row[: row.index(stop)] if stop in row else row for row in free]
    assert run(model, prompts, [GREEDY] * 3, max_new_tokens=12, stop_token_ids=[stop]) == expected
    assert len(expected[1]) <= 5 < max(map(len, expected))

    rows, decoding = make_rows(prompts, [GREEDY] * 3, 12), Decoding(model)
    decoding.join(rows)
    decoding.step()
    rows[0].reason = "enough"
    while decoding.rows:
        decoding.step()
    assert [row.new_tokens for row in rows] == [free[0][:1], free[1], free[2]]


@pytest.mark.parametrize("name", ["tiny", "tiny-moe"])
@pytest.mark.parametrize("options", [GREEDY, SHARP])
def test_rows_that_come_and_go_get_the_tokens_they_get_alone(name, options):
    """Prompts of 1 to 40 tokens join a batch of at most four as places become free; some are given up on the way."""
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS[name], vocab_size=300, initializer_range=0.2)
    model = MiniMindForCausalLM(config).double().eval()
    chance = Random(0)
    sampling = [dataclasses.replace(options, seed=i, max_new_tokens=chance.choice([1, 2, 9, 30])) for i in range(24)]
    rows = [Row(random_prompt(chance.randint(1, 40), i), sampling[i]) for i in range(24)]
    waiting, decoding, given_up = list(rows), Decoding(model), 0
    while waiting or decoding.rows:
        free = 4 - len(decoding.rows)
        decoding.join(waiting[:free])
        del waiting[:free]
        decoding.step()
        if decoding.rows and chance.random() < 0.05:
            chance.choice(decoding.rows).reason = "given up"
            given_up += 1
    assert given_up >= 3
    for row in rows:
        alone = Row(row.tokens[: -len(row.new_tokens)], row.options)
        for _ in decode(model, [alone]):
            pass
        assert row.new_tokens == alone.new_tokens[: len(row.new_tokens)]
        assert row.reason == "given up" or len(row.new_tokens) == row.options.max_new_tokens


def test_log_probabilities_are_those_of_a_full_forward(model):
    options = dataclasses.replace(SHARP, max_new_tokens=6)
    rows = [Row(random_prompt(5), options, num_logprobs=3), Row(random_prompt(9), options, num_logprobs=0)]
    rows.append(Row(random_prompt(2), options))
    for _ in decode(model, rows):
        pass
    with torch.no_grad():
        expected = model(torch.tensor([rows[0].tokens])).logits[0, 4:-1].float().log_softmax(-1)
    for step, entry in enumerate(rows[0].logprobs):
        assert entry.token == rows[0].new_tokens[step]
        assert entry.logprob == pytest.approx(float(expected[step, entry.token]), abs=1e-5)
        assert [token for token, _ in entry.likeliest] == expected[step].topk(3).indices.tolist()
    assert [len(row.logprobs) for row in rows] == [6, 6, 0] and rows[1].logprobs[0].likeliest == []


def test_a_cache_that_nobody_joins_or_leaves_is_made_once(model):
    """A copy a token would cost more than the token."""
    row, decoding = Row(random_prompt(5), dataclasses.replace(GREEDY, max_new_tokens=7)), Decoding(model)
    decoding.join([row])
    decoding.step()
    (group,) = decoding._groups
    while decoding.rows:
        decoding.step()
    assert decoding._groups == [group] and group.cache.length == 11 < group.cache.keys.shape[3]


def test_every_position_can_be_used(model):
    limit = model.config.max_position_embeddings
    prompt = random_prompt(limit - 3)
    assert len(run(model, [prompt], [GREEDY], max_new_tokens=3)[0]) == 3
    with pytest.raises(UserError, match=f"{limit - 3} tokens and max_new_tokens 4 are beyond the model's {limit}"):
        run(model, [prompt], [GREEDY], max_new_tokens=4)


@pytest.mark.parametrize(("prompt", "said"), [([], "empty prompt"), ([300], "token id 300"), ([5, -1], "token id -1")])
def test_prompts_that_cannot_be_continued_are_refused(model, prompt, said):
    with pytest.raises(UserError, match=said):
        Decoding(model).join([Row([5], GREEDY), Row(prompt, GREEDY)])
    with pytest.raises(UserError, match="max_new_tokens: 0 is not"):
        dataclasses.replace(GREEDY, max_new_tokens=0)


def test_a_diverged_model_is_named_instead_of_sampled():
    model = build_model()
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    with pytest.raises(UserError, match="NaN or infinite"):
        run(model, [[5]], [GREEDY], max_new_tokens=1)


def test_a_stretched_context_reads_beyond_the_trained_one():
    model, plain = build_model(max_position_embeddings=32), build_model(max_position_embeddings=32)
    stretch_context(model, 4.0, 32)
    prompt = random_prompt(100)
    with pytest.raises(UserError, match="32 positions"):
        run(plain, [prompt], [GREEDY], max_new_tokens=20)
    configured = ModelConfig(**{**model.config.to_dict()})
    assert configured.max_position_embeddings == 128 and configured.rope_scaling_factor == 4.0
    built = MiniMindForCausalLM(configured).double().eval()
    built.load_state_dict(model.state_dict())
    decoded = run(model, [prompt], [GREEDY], max_new_tokens=20)
    assert decoded == run(built, [prompt], [GREEDY], max_new_tokens=20)
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
        expected = run(plain, prompts, [GREEDY], max_new_tokens=count)
        assert run(compiled, prompts, [GREEDY], max_new_tokens=count) == expected
    assert counters["stats"]["unique_graphs"] == 1
