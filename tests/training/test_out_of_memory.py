"""A run whose memory is full: one line in place of a traceback, and the same command goes on with a smaller batch.

What two ranks do stands in test_checkpoint_faults.
"""

from typing import Any

import pytest
import torch
from training_runs import flags_for, losses, train

from minimind.checkpoints.folder import list_checkpoints
from minimind.distributed.out_of_memory import is_out_of_memory
from minimind.errors import OneRankError, UserError
from minimind.evaluate import OUTPUT_NAME
from minimind.evaluate import main as evaluate
from minimind.generate import main as generate
from minimind.model import MiniMindForCausalLM
from minimind.training.record.events import read_events

TOO_MANY_BYTES = 1 << 45


def fill_memory(monkeypatch, call: int, error: Exception | None = None) -> None:
    """At its `call`-th training micro-batch the model asks for more than there is, or meets `error`."""
    forward, calls = MiniMindForCausalLM.forward, [0]

    def forward_or_fail(self, *args: Any, **kwargs: Any) -> Any:
        calls[0] += self.training
        if calls[0] == call:
            if error is not None:
                raise error
            torch.empty(TOO_MANY_BYTES, dtype=torch.uint8)
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(MiniMindForCausalLM, "forward", forward_or_fail)


def test_it_is_one_line_with_the_cures_and_the_run_goes_on(tiny_corpus, tmp_path, monkeypatch):
    settings = {"micro_batch_size": 2, "stage": 2, "async_save": False}
    with monkeypatch.context() as patch:
        fill_memory(patch, 10)  # two micro-batches a step: the fifth step
        with pytest.raises(OneRankError) as error:
            train(flags_for(tiny_corpus, tmp_path, **settings))
    assert str(error.value) == (
        "the host is out of memory at step 5, forward and backward (32.0 TiB more were wanted): lower "
        "--micro-batch-size 2; pass --activation-checkpointing; take a ZeRO stage above 2 (--ds-config); shorten "
        "--seq-len 16; --dry-run itemises what a rank needs"
    )
    last = read_events(tmp_path)[-1]
    assert (last.event, last.step, last.message) == ("fail", 4, str(error.value))
    assert [path.name for path in list_checkpoints(tmp_path)] == ["step_00000002", "step_00000004"]
    code, printed = train(flags_for(tiny_corpus, tmp_path, stage=3, micro_batch_size=1, activation_checkpointing=True))
    assert code == 0 and "step_00000004" in printed and list(losses(tmp_path)) == [1, 2, 3, 4, 5, 6]


def test_a_cure_that_is_taken_is_not_named(tiny_corpus, tmp_path, monkeypatch):
    """With the words of torch's allocator on a GPU."""
    said = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB of which 1.1 GiB is"
    fill_memory(monkeypatch, 1, torch.OutOfMemoryError(said))
    with pytest.raises(OneRankError) as error:
        train(flags_for(tiny_corpus, tmp_path, stage=3, activation_checkpointing=True))
    assert str(error.value) == (
        "cpu is out of memory at step 1, forward and backward (2.00 GiB more were wanted): shorten --seq-len 16; "
        "--dry-run itemises what a rank needs"
    )


def test_another_error_stays_what_it_is(tiny_corpus, tmp_path, monkeypatch):
    fill_memory(monkeypatch, 1, RuntimeError("a bug"))
    with pytest.raises(RuntimeError, match=r"^a bug$"):
        train(flags_for(tiny_corpus, tmp_path))
    assert not is_out_of_memory(RuntimeError("CUDA error: an illegal memory access was encountered"))
    assert is_out_of_memory(MemoryError())
    for words in ("CUBLAS_STATUS_ALLOC_FAILED when calling cublasCreate(handle)", "CUDA error: out of memory"):
        assert is_out_of_memory(RuntimeError(words))
    assert is_out_of_memory(RuntimeError("NCCL error: Cuda failure 'out of memory'"))


def test_generate_and_evaluate_say_what_helps_them(tiny_corpus, tmp_path, monkeypatch):
    train(flags_for(tiny_corpus, tmp_path))
    asked = ["--checkpoint", str(tmp_path), "--device", "cpu"]
    monkeypatch.setattr(MiniMindForCausalLM, "forward", lambda *_, **__: torch.empty(TOO_MANY_BYTES, dtype=torch.uint8))
    prompts = ["--prompt", "one", "two", "--max-new-tokens", "4"]
    shards = ["--shards", str(tiny_corpus), "--seq-len", "16", "--precision", "bf16"]
    questions = tmp_path / "questions.jsonl"
    questions.write_text('{"context": "a", "choices": ["b", "c"], "answer": 0}\n')
    start = "the host is out of memory (32.0 TiB more were wanted): "
    for command, flags, words in (
        (generate, prompts, "pass --int8; give fewer than 2 prompts at once; lower --max-new-tokens 4"),
        (generate, ["--prompt", "one", "--int8"], "lower --max-new-tokens 256"),
        (evaluate, shards, "lower --micro-batch-size 8; shorten --seq-len 16"),
        (
            evaluate,
            ["--multiple-choice", str(questions)],
            f"pass --precision bf16; shorten the questions of {questions}",
        ),
    ):
        with pytest.raises(UserError) as error:
            command([*asked, *flags])
        assert str(error.value) == start + words
    assert not (tmp_path / OUTPUT_NAME).exists()
