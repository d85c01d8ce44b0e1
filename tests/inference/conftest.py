"""A random model that is served, and what it answers by itself."""

import dataclasses
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tokenizers_for_tests import save_byte_level

from minimind.checkpoints.formats.load_model import load_model
from minimind.data.chat_template import encode_chat
from minimind.data.tokenizer import load_tokenizer
from minimind.inference.decoding import Decoding
from minimind.inference.generation import complete
from minimind.inference.sampling import GenerationOptions
from minimind.model import PRESETS, MiniMindForCausalLM


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    """A random model that says something of every prompt, and says it long."""
    folder = tmp_path_factory.mktemp("served") / "tiny-model"
    tokenizer = load_tokenizer(save_byte_level(folder))
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, initializer_range=0.3)
    MiniMindForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(exported):
    return load_model(exported)[0], load_tokenizer(exported)


@pytest.fixture
def expected_answer(model) -> Callable[..., str]:
    """What generation gives to a question, without a server."""

    def answer(question: str, max_new_tokens: int = 24) -> str:
        options = GenerationOptions(temperature=0.0, max_new_tokens=max_new_tokens)
        prompt = encode_chat(model[1], [{"role": "user", "content": question}])
        return complete(*model, [prompt], options)[0].text

    return answer


@pytest.fixture
def gate(monkeypatch) -> Iterator[threading.Event]:
    """No token is decoded before it is set."""
    gate, step = threading.Event(), Decoding.step

    def step_behind_gate(decoding: Decoding):
        gate.wait()
        return step(decoding)

    monkeypatch.setattr(Decoding, "step", step_behind_gate)
    yield gate
    gate.set()
