"""Loss, perplexity and bits per byte, against the plain sum over all tokens."""

import dataclasses
import itertools
import json
import math
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from repository import ROOT
from tokenizers_for_tests import TEXT, save_sentencepiece

from minimind import errors
from minimind.data.dataset import TokenDataset
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import ShardReader
from minimind.data.tokenizer import load_tokenizer
from minimind.errors import UserError
from minimind.evaluate import main, output_folder
from minimind.inference.evaluation import Evaluation, measure_loss, shards_of_texts
from minimind.model import PRESETS, MiniMindForCausalLM

SEQ_LEN = 32


@pytest.fixture(scope="module")
def exported(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    tokenizer = load_tokenizer(save_sentencepiece(folder))
    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=tokenizer.vocab_size, initializer_range=0.1)
    MiniMindForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def model(exported) -> MiniMindForCausalLM:
    return MiniMindForCausalLM.from_pretrained(exported)


@pytest.fixture(scope="module")
def corpus(exported, tmp_path_factory) -> Path:
    """Train and validation splits of different texts."""
    folder = tmp_path_factory.mktemp("corpus")
    tokenizer = load_tokenizer(exported)
    for split, texts in (("train", [TEXT[:500]]), ("val", [TEXT[i : i + 97] for i in range(0, 1000, 97)])):
        with ShardWriter(folder / split, vocab_size=400, eos_token_id=0, tokenizer_file=tokenizer.file) as writer:
            for text in texts:
                writer.add_document(np.array(tokenizer.encode(text)), len(text.encode()))
    return folder


def evaluate(model: MiniMindForCausalLM, dataset: TokenDataset, **options) -> Evaluation:
    return measure_loss(model, dataset, torch.device("cpu"), **options)


def val_dataset(corpus: Path, document_mask: bool = False) -> TokenDataset:
    return TokenDataset(ShardReader(corpus / "val"), SEQ_LEN, document_mask, keep_tail=True)


@torch.no_grad()
def plain_loss(model: MiniMindForCausalLM, reader: ShardReader, seq_len: int) -> tuple[float, int]:
    """Sum of the losses and number of tokens, window by window, through the logits."""
    stream = torch.from_numpy(reader.read(0, reader.num_tokens).astype(np.int64))
    total = 0.0
    for start in range(0, len(stream) - 1, seq_len):
        window = stream[start : start + seq_len + 1]
        logits = model(window[None, :-1]).logits[0]
        total += float(F.cross_entropy(logits.double(), window[1:], reduction="sum"))
    return total, len(stream) - 1


@pytest.mark.parametrize("micro_batch_size", [1, 3, 64])
def test_every_token_is_predicted_once(model, corpus, micro_batch_size):
    dataset = val_dataset(corpus)
    result = evaluate(model, dataset, micro_batch_size=micro_batch_size)
    total, count = plain_loss(model, dataset.reader, SEQ_LEN)
    manifest = dataset.reader.manifest
    assert result.num_targets == count == manifest.total_tokens - 1 and result.num_samples == len(dataset)
    assert result.loss == pytest.approx(total / count, rel=1e-5)
    assert result.perplexity == pytest.approx(math.exp(result.loss))
    bits = result.loss / math.log(2) * manifest.total_tokens / manifest.total_bytes
    assert result.bits_per_byte == pytest.approx(bits)


def test_the_document_mask_is_that_of_training(model, corpus):
    dataset = val_dataset(corpus, document_mask=True)
    masked = evaluate(model, dataset)
    assert masked.num_targets == dataset.reader.num_tokens - dataset.reader.manifest.total_documents
    assert masked.loss != evaluate(model, val_dataset(corpus)).loss


def test_masked_documents_in_one_window_are_documents_alone(model, corpus):
    reader = ShardReader(corpus / "val")
    assert reader.num_tokens <= 512
    starts = [*reader.document_starts(0, reader.num_tokens).tolist(), reader.num_tokens]
    alone = 0.0
    for low, high in itertools.pairwise(starts):
        token_ids = torch.from_numpy(reader.read(low, high - low).astype(np.int64))[None]
        with torch.no_grad():
            logits = model(token_ids[:, :-1]).logits[0].double()
        alone += float(F.cross_entropy(logits, token_ids[0, 1:], reduction="sum"))
    result = evaluate(model, TokenDataset(reader, 512, document_mask=True, keep_tail=True))
    assert result.loss == pytest.approx(alone / result.num_targets, rel=1e-5)


def test_a_part_of_the_data_is_its_first_windows(model, corpus):
    result = evaluate(model, val_dataset(corpus), max_samples=3)
    assert (result.num_samples, result.num_targets) == (3, 3 * SEQ_LEN)
    assert evaluate(model, val_dataset(corpus), max_samples=10**6) == evaluate(model, val_dataset(corpus))


def test_a_diverged_model_is_named(exported, corpus, tmp_path):
    model = MiniMindForCausalLM.from_pretrained(exported)
    with torch.no_grad():
        model.model.norm.weight.fill_(float("nan"))
    model.save_pretrained(tmp_path)
    shutil.copy(exported / "tokenizer.model", tmp_path)
    with pytest.raises(UserError, match=r"the loss over .* tokens is nan"):
        main(["--checkpoint", str(tmp_path), "--shards", str(corpus), "--device", "cpu"])


def test_texts_are_documents(exported, tmp_path):
    files = []
    for name, text in (("a.txt", "the fox\n"), ("b.txt", "你好 <|im_end|>")):
        files.append(tmp_path / name)
        files[-1].write_text(text, encoding="utf-8")
    tokenizer = load_tokenizer(exported)
    with shards_of_texts(files, tokenizer.file) as reader:
        folder = reader.folder
        token_ids = reader.read(0, reader.num_tokens)
        assert reader.manifest.total_documents == 2
        assert reader.manifest.total_bytes == sum(file.stat().st_size for file in files)
        assert tokenizer.decode(token_ids) == "the fox\n<|endoftext|>你好 <|im_end|><|endoftext|>"
        assert 2 not in token_ids  # a mark in the text is text
    assert not folder.exists()


@pytest.mark.parametrize(("content", "said"), [(b"", "is empty"), (b"a\xff", "byte 1 is 0xff"), (None, "cannot read")])
def test_a_bad_text_file_is_named(exported, tmp_path, content, said):
    if content is not None:
        (tmp_path / "bad.txt").write_bytes(content)
    context = shards_of_texts([tmp_path / "bad.txt"], exported / "tokenizer.model")
    with pytest.raises(UserError, match=rf"bad\.txt.*{said}|{said}.*bad\.txt"), context:
        pass


# --- the command ------------------------------------------------------------------------------------------------------


def run_main(capsys, *flags: object) -> str:
    main([str(flag) for flag in flags])
    return capsys.readouterr().out


def test_the_command_writes_its_result_beside_the_model(capsys, exported, model, corpus, tmp_path):
    flags = ["--checkpoint", exported, "--shards", corpus, "--seq-len", SEQ_LEN, "--device", "cpu"]
    shown = run_main(capsys, *flags)
    expected = evaluate(model, val_dataset(corpus))
    written = json.loads((exported / "evaluation.json").read_text())
    figures = {name: value for name, value in dataclasses.asdict(expected).items() if name != "figures"}
    assert {name: written[name] for name in figures} == figures
    assert written["shards"] == str(corpus) and written["split"] == "val" and written["seq_len"] == SEQ_LEN
    assert written["data_fingerprint"] == ShardReader(corpus / "val").fingerprint
    assert f"bits per byte   {expected.bits_per_byte:.4f}" in shown
    run_main(capsys, *flags[:2], "--shards", corpus / "val", *flags[4:], "--output", tmp_path / "here.json")
    assert json.loads((tmp_path / "here.json").read_text())["loss"] == expected.loss
    run_main(capsys, *flags, "--split", "train", "--output", tmp_path / "train.json")
    assert json.loads((tmp_path / "train.json").read_text())["loss"] != expected.loss


def test_the_command_reads_texts(capsys, exported, model, tmp_path):
    (tmp_path / "a.txt").write_text(TEXT[:700], encoding="utf-8")
    flags = ["--checkpoint", exported, "--text", tmp_path / "a.txt", "--seq-len", SEQ_LEN, "--device", "cpu"]
    run_main(capsys, *flags, "--output", tmp_path / "out.json")
    with shards_of_texts([tmp_path / "a.txt"], exported / "tokenizer.model") as reader:
        total, count = plain_loss(model, reader, SEQ_LEN)
        bytes_per_token = len(TEXT[:700].encode()) / reader.num_tokens
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["loss"] == pytest.approx(total / count, rel=1e-5)
    assert written["bits_per_byte"] == pytest.approx(total / count / math.log(2) / bytes_per_token, rel=1e-5)


def test_two_ranks_give_the_answer_of_one(exported, model, corpus, tmp_path):
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "minimind.evaluate", "--checkpoint", str(exported), "--shards", str(corpus)]
    command += ["--seq-len", str(SEQ_LEN), "--micro-batch-size", "2", "--device", "cpu"]
    command += ["--output", str(tmp_path / "out.json")]
    ranks = []
    for rank in range(2):
        env = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2, "MASTER_PORT": port}
        env = {**os.environ, **{name: str(value) for name, value in env.items()}, "MASTER_ADDR": "127.0.0.1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
        ranks.append(subprocess.Popen(command, cwd=ROOT, env=env, **pipes))
    outputs = [rank.communicate(timeout=300) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0], outputs
    written = json.loads((tmp_path / "out.json").read_text())
    alone = evaluate(model, val_dataset(corpus))
    assert written["num_targets"] == alone.num_targets
    assert written["loss"] == pytest.approx(alone.loss, rel=1e-6)
    assert "bits per byte" in outputs[0][0] and outputs[1][0] == ""


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "either --shards DIR or --text FILES or --multiple-choice FILE"),
        (["--shards", "a", "--text", "b"], "either --shards DIR or --text FILES or --multiple-choice FILE"),
        (["--shards", "a", "--seq-len", "0"], "seq_len: 0 is not"),
        (["--shards", "/nowhere"], "/nowhere does not exist"),
        (["--split", "test"], "split"),
    ],
)
def test_a_wrong_flag_is_one_line(capsys, exported, flags, said):
    with pytest.raises(SystemExit) as caught:
        errors.run_main(lambda: main(["--checkpoint", str(exported), "--device", "cpu", *flags]))
    out, err = capsys.readouterr()
    assert caught.value.code == 2 and out == ""
    assert said in err and err.startswith("error: ") and err.count("\n") == 1


def test_data_of_a_larger_vocabulary_is_refused(exported, tmp_path):
    file = exported / "tokenizer.model"
    with ShardWriter(tmp_path / "big", vocab_size=500, eos_token_id=0, tokenizer_file=file) as writer:
        writer.add_document(np.array([499]), 1)
    with pytest.raises(UserError, match="500 tokens and the model one of 400"):
        main(["--checkpoint", str(exported), "--device", "cpu", "--shards", str(tmp_path / "big")])


def test_the_result_of_a_checkpoint_lies_in_its_run():
    assert output_folder(Path("/runs/a/checkpoints/step_00000010")) == Path("/runs/a")
    assert output_folder(Path("/runs/a")) == Path("/runs/a")
