"""Text from a model: the Python interface and the command."""

import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from repository import ROOT
from tokenizers_for_tests import save_byte_level, save_sentencepiece

from minimind import errors
from minimind.checkpoints.formats.load_model import load_model
from minimind.data.chat_template import encode_chat
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.errors import UserError
from minimind.generate import main
from minimind.inference.device import choose_device
from minimind.inference.generation import Completion, complete, stream_text
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM

GREEDY = GenerationOptions(temperature=0.0, max_new_tokens=24, stop_token_ids=())
PROMPTS = ["the quick brown fox", "你好", "x", "def f(x):\n    return", "", "lazy dog. " * 5]


@pytest.fixture(scope="module", params=[save_sentencepiece, save_byte_level])
def exported(request, tmp_path_factory) -> Path:
    """An exported folder: a random tiny model and a tokenizer."""
    folder = tmp_path_factory.mktemp("export")
    tokenizer = load_tokenizer(request.param(folder))
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size + 8, initializer_range=0.3)
    MiniMindForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(exported) -> MiniMindForCausalLM:
    return load_model(exported)[0]


@pytest.fixture(scope="module")
def tokenizer(exported) -> Tokenizer:
    return load_tokenizer(load_model(exported)[1])


def test_a_batch_of_texts_equals_single_runs(model, tokenizer):
    for options in (GREEDY, GenerationOptions(max_new_tokens=24, seed=5, repetition_penalty=1.2)):
        together = complete(model, tokenizer, PROMPTS, options)
        for row, prompt in enumerate(PROMPTS):
            seed = None if options.seed is None else options.seed + row
            assert complete(model, tokenizer, [prompt], dataclasses.replace(options, seed=seed)) == [together[row]]
        assert len({completion.text for completion in together}) == len(PROMPTS)


def test_the_stream_is_the_text(model, tokenizer):
    for prompt in PROMPTS:
        pieces = list(stream_text(model, tokenizer, prompt, GREEDY))
        (completion,) = complete(model, tokenizer, [prompt], GREEDY)
        assert "".join(pieces) == completion.text and len(pieces) > 3
        prompt_ids = tokenizer.encode(prompt) or [tokenizer.eos_token_id]
        whole = tokenizer.decode([*prompt_ids, *completion.token_ids])
        assert whole == tokenizer.decode(prompt_ids) + completion.text
        assert completion.reason == "length" and len(completion.token_ids) == 24
        assert max(completion.token_ids) < tokenizer.vocab_size  # the model has 8 ids more


def test_token_ids_are_prompts_too(model, tokenizer):
    prompt = tokenizer.encode("the fox")
    assert complete(model, tokenizer, [prompt], GREEDY) == complete(model, tokenizer, ["the fox"], GREEDY)


def test_an_empty_prompt_begins_a_document(model, tokenizer):
    assert complete(model, tokenizer, [""], GREEDY) == complete(model, tokenizer, ["<|endoftext|>"], GREEDY)


def test_stop_tokens_and_stop_texts_end_a_row(model, tokenizer):
    (free,) = complete(model, tokenizer, ["the fox"], GREEDY)
    token = free.token_ids[7]
    first = free.token_ids.index(token)
    by_token = dataclasses.replace(GREEDY, stop_token_ids=(token,))
    assert complete(model, tokenizer, ["the fox"], by_token)[0].token_ids == free.token_ids[:first]
    assert complete(model, tokenizer, ["the fox"], by_token)[0].reason == "stop"

    text = free.text[5:8]
    by_text = dataclasses.replace(GREEDY, stop=("no such text", text))
    (stopped,) = complete(model, tokenizer, ["the fox"], by_text)
    assert stopped.text == free.text[: free.text.index(text)] and stopped.reason == "stop"
    assert len(stopped.token_ids) < 24 and "".join(stream_text(model, tokenizer, "the fox", by_text)) == stopped.text


def test_by_default_the_end_of_a_document_or_turn_ends_it(model, tokenizer, monkeypatch):
    draws = iter([5, 6, 2, 7])
    monkeypatch.setattr("minimind.inference.decoding.draw", lambda *_: torch.tensor([next(draws)]))
    (completion,) = complete(model, tokenizer, ["the fox"])
    assert completion == Completion(completion.text, (5, 6), "stop")


def test_generation_does_not_disturb_training(model, tokenizer):
    model.train()
    pieces = stream_text(model, tokenizer, "the fox", GREEDY)
    next(pieces)
    pieces.close()
    assert model.training and all(module.training for module in model.modules())
    assert not any(parameter.requires_grad and parameter.is_inference() for parameter in model.parameters())
    model(torch.tensor([[1, 2]]), torch.tensor([[2, 3]])).loss.backward()
    model.zero_grad()
    model.eval()


def test_what_cannot_be_continued_is_one_error(model, tokenizer):
    with pytest.raises(UserError, match="beyond the model's 512"):
        complete(model, tokenizer, ["x " * 600], GREEDY)
    with pytest.raises(UserError, match="device cuda:99: cannot be used"):
        choose_device("cuda:99", None)
    with pytest.raises(UserError, match="device nonsense"):
        choose_device("nonsense", None)


# --- loading ----------------------------------------------------------------------------------------------------------


def test_what_is_no_model_is_refused(exported, tmp_path):
    with pytest.raises(UserError, match="does not exist"):
        load_model(tmp_path / "nowhere")
    with pytest.raises(UserError, match="holds no model"):
        load_model(tmp_path)
    for name in ("config.json", "model.safetensors"):
        (tmp_path / name).write_bytes((exported / name).read_bytes())
    with pytest.raises(UserError, match="no tokenizer"):
        load_model(tmp_path)


def test_weights_are_converted_on_request(exported):
    assert load_model(exported)[0].lm_head.weight.dtype == torch.float32
    model, file = load_model(exported, dtype=torch.bfloat16)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16} and not model.training
    tokenizer = load_tokenizer(file)
    assert len(complete(model, tokenizer, PROMPTS, GREEDY)[1].token_ids) == 24


# --- the command ------------------------------------------------------------------------------------------------------


def run_main(capsys, exported: Path, *flags: str) -> str:
    main(["--checkpoint", str(exported), "--temperature", "0", "--max-new-tokens", "16", "--device", "cpu", *flags])
    return capsys.readouterr().out


def test_the_command_prints_the_continuation(capsys, exported, model, tokenizer):
    options = GenerationOptions(temperature=0.0, max_new_tokens=16)
    (expected,) = complete(model, tokenizer, ["the fox"], options)
    assert run_main(capsys, exported, "--prompt", "the fox") == expected.text + "\n"


def test_the_command_prints_json(capsys, exported, model, tokenizer):
    lines = run_main(capsys, exported, "--json", "--prompt", "the fox", "你好").splitlines()
    options = GenerationOptions(temperature=0.0, max_new_tokens=16)
    expected = complete(model, tokenizer, ["the fox", "你好"], options)
    for line, prompt, completion in zip(lines, ["the fox", "你好"], expected, strict=True):
        values = json.loads(line)
        assert values == {"prompt": prompt, **dataclasses.asdict(completion), "token_ids": list(completion.token_ids)}


def test_a_prompt_can_be_a_question(capsys, exported, model, tokenizer):
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "the fox"}]
    options = GenerationOptions(temperature=0.0, max_new_tokens=16)
    (expected,) = complete(model, tokenizer, [encode_chat(tokenizer, messages)], options)
    shown = run_main(capsys, exported, "--chat", "--system", "be brief", "--prompt", "the fox")
    assert shown == expected.text + "\n"


def test_a_question_may_offer_tools(capsys, exported, model, tokenizer, tmp_path):
    tools = [{"type": "function", "function": {"name": "add"}}]
    (tmp_path / "tools.json").write_text(json.dumps(tools))
    prompt = encode_chat(tokenizer, [{"role": "user", "content": "the fox"}], tools, thinking=True)
    (expected,) = complete(model, tokenizer, [prompt], GenerationOptions(temperature=0.0, max_new_tokens=16))
    flags = ("--tools", str(tmp_path / "tools.json"), "--thinking", "True", "--prompt", "the fox")
    values = json.loads(run_main(capsys, exported, "--chat", "--json", *flags))
    assert values["text"] == expected.text
    assert values["message"] == {"role": "assistant", "content": "", "reasoning_content": expected.text}


def test_yarn_by_a_flag_reads_a_longer_prompt(capsys, exported):
    prompt = "龘 " * 200
    with pytest.raises(UserError, match="--rope-scaling-factor"):
        run_main(capsys, exported, "--prompt", prompt)
    flags = ("--rope-scaling-factor", "4", "--rope-original-max-position-embeddings", "512")
    assert len(run_main(capsys, exported, "--prompt", prompt, *flags)) > 1


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temperature", "-1"], "temperature: -1.0 is not"),
        (["--top-p", "2"], "top_p: 2.0 is not"),
        (["--no-such-flag"], "no-such-flag"),
        (["--system", "x", "--prompt", "y"], "add --chat"),
        (["--thinking", "True", "--prompt", "y"], "thinking has no effect on plain prompts: add --chat"),
        (["--tools", "/nowhere"], "tools /nowhere: No such file"),
        (["--tools", str(ROOT / "ds_configs/zero1.json")], "zero1.json: not a list of objects"),
        (["--json"], "json needs --prompt"),
        (["--rope-original-max-position-embeddings", "5", "--prompt", "x"], "without --rope-scaling-factor"),
        (["--checkpoint", "/nowhere", "--prompt", "x"], "/nowhere does not exist"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, flags, said):
    if "--checkpoint" not in flags:
        flags = ["--checkpoint", ".", *flags]
    with pytest.raises(SystemExit) as caught:
        errors.run_main(lambda: main(flags))
    assert caught.value.code == 2
    out, err = capsys.readouterr()
    assert out == "" and said in err and err.startswith("error: ") and err.count("\n") == 1


def test_lines_of_the_input_are_a_chat(exported):
    command = [sys.executable, "-m", "minimind.generate", "--checkpoint", str(exported), "--device", "cpu"]
    done = subprocess.run(
        [*command, "--max-new-tokens", "8", "--seed", "1"],
        input=b"the fox\n/retry\n/nonsense\n",
        cwd=ROOT,
        capture_output=True,
        check=True,
    )
    lines = done.stdout.decode().splitlines()  # U+FFFD for bytes of a random model, never an error
    assert lines[0] == "Type a message, or /help." and "unknown command /nonsense; /help lists them" in lines
    assert done.stderr == b""
