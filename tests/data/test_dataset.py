"""Windows of a token stream, and batches of them."""

import dataclasses
import itertools

import numpy as np
import pytest
import torch
from shard_folders import EOS, SEQ_LEN, stream_of, write

from minimind.data.dataset import IGNORED_LABEL, TokenDataset
from minimind.data.loader import collate
from minimind.data.manifest import ShardError
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import ShardReader
from minimind.errors import UserError


def test_windows_tile_the_stream_without_padding(reader, dataset, documents):
    stream = stream_of(documents)
    assert len(dataset) == (len(stream) - 1) // SEQ_LEN
    inputs = np.concatenate([dataset[i].input_ids for i in range(len(dataset))])
    labels = np.concatenate([dataset[i].labels for i in range(len(dataset))])
    np.testing.assert_array_equal(inputs, stream[: len(inputs)])
    np.testing.assert_array_equal(labels, stream[1 : len(labels) + 1])
    assert inputs.dtype == labels.dtype == np.int64
    for index in (-1, len(dataset)):
        with pytest.raises(IndexError):
            dataset[index]


def test_the_last_window_may_end_with_the_stream(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"t")
    write(tmp_path / "train", tmp_path / "tokenizer.model", [np.arange(1, 33)])  # 33 tokens with the end token
    exact = TokenDataset(ShardReader(tmp_path / "train"), 32)
    assert len(exact) == 1 and exact[0].labels[-1] == EOS
    with pytest.raises(ShardError, match="has 33 tokens, a window of seq_len 33 needs 34"):
        TokenDataset(ShardReader(tmp_path / "train"), 33)


def test_an_empty_split_is_refused_with_the_figures(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"t")
    write(tmp_path / "val", tmp_path / "tokenizer.model", [])
    for keep_tail in (False, True):
        with pytest.raises(UserError, match="has 0 tokens"):
            TokenDataset(ShardReader(tmp_path / "val"), 8, keep_tail=keep_tail)


def test_the_tail_is_filled_without_labels(reader, documents):
    stream = stream_of(documents)
    for seq_len in (SEQ_LEN, 10**4):
        dataset = TokenDataset(reader, seq_len, keep_tail=True)
        labels = np.concatenate([dataset[i].labels for i in range(len(dataset))])
        assert len(labels) == len(dataset) * seq_len
        np.testing.assert_array_equal(labels[labels != IGNORED_LABEL], stream[1:])
        assert np.all(labels[len(stream) - 1 :] == IGNORED_LABEL)
        assert np.all(dataset[len(dataset) - 1].input_ids[(len(stream) - 1) % seq_len or seq_len :] == EOS)


def test_document_mask_cuts_where_documents_begin(reader, documents):
    stream = stream_of(documents)
    is_start = np.append(True, stream[:-1] == EOS)
    masked = TokenDataset(reader, SEQ_LEN, document_mask=True)
    for index in range(len(masked)):
        sample, first = masked[index], index * SEQ_LEN
        inside = np.flatnonzero(is_start[first : first + SEQ_LEN])
        np.testing.assert_array_equal(sample.document_starts, inside[inside > 0])
        expected = np.where(is_start[first + 1 : first + 1 + SEQ_LEN], IGNORED_LABEL, stream[first + 1 :][:SEQ_LEN])
        np.testing.assert_array_equal(sample.labels, expected)
        np.testing.assert_array_equal(sample.input_ids, stream[first : first + SEQ_LEN])


def test_a_window_may_be_a_million_tokens_of_several_shards_and_documents(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"t")
    length, document = 1_000_000, np.arange(1, 300_000) % 250 + 1
    with ShardWriter(
        tmp_path / "train", vocab_size=256, eos_token_id=EOS, tokenizer_file=tmp_path / "tokenizer.model",
        shard_tokens=350_000,
    ) as writer:  # fmt: skip
        for _ in range(7):
            writer.add_document(document, len(document))
    reader = ShardReader(tmp_path / "train")
    dataset = TokenDataset(reader, length, document_mask=True)
    assert len(dataset) == 2 and len(reader.manifest.shards) > 3
    stream = np.concatenate([np.append(document, EOS)] * 7)
    batch = collate([dataset[1], dataset[0]], [1, 0])
    np.testing.assert_array_equal(batch.input_ids[0], stream[length : 2 * length])
    borders = [0, 200_000, 500_000, 800_000, length, *(length + 300_000 * i for i in (1, 2, 3)), 2 * length]
    assert batch.cu_seqlens.tolist() == borders and int(batch.position_ids.max()) == 299_999
    for low, high in itertools.pairwise(borders):
        assert batch.position_ids.flatten()[low] == 0 and batch.position_ids.flatten()[high - 1] == high - low - 1
    assert batch.num_targets == 2 * length - 6, "the first token of each document is no target"


def test_a_masked_batch_describes_its_segments(reader):
    masked = TokenDataset(reader, SEQ_LEN, document_mask=True)
    indices = [3, 0, 7]
    batch = collate([masked[i] for i in indices], indices)
    assert batch.cu_seqlens is not None and batch.position_ids is not None
    assert batch.cu_seqlens.dtype == torch.int32 and batch.position_ids.dtype == torch.int64
    bounds = batch.cu_seqlens.tolist()
    assert bounds[0] == 0 and bounds[-1] == 3 * SEQ_LEN and bounds == sorted(set(bounds))
    assert {0, SEQ_LEN, 2 * SEQ_LEN, 3 * SEQ_LEN} <= set(bounds)
    flat_inputs, flat_labels = batch.input_ids.flatten(), batch.labels.flatten()
    positions = torch.cat([torch.arange(high - low) for low, high in itertools.pairwise(bounds)])
    assert torch.equal(batch.position_ids.flatten(), positions)
    for low, high in itertools.pairwise(bounds):
        assert not (flat_inputs[low : high - 1] == EOS).any()  # a segment holds one document
        if flat_inputs[high - 1] == EOS:
            assert flat_labels[high - 1] == IGNORED_LABEL
    assert batch.num_targets == int((batch.labels != IGNORED_LABEL).sum()) < 3 * SEQ_LEN


def test_an_unmasked_batch_has_no_segments(dataset):
    batch = collate([dataset[0], dataset[1]], (0, 1))
    assert batch.position_ids is None and batch.cu_seqlens is None
    assert batch.input_ids.shape == batch.labels.shape == (2, SEQ_LEN)
    assert batch.input_ids.dtype == batch.labels.dtype == torch.int64
    assert batch.num_targets == 2 * SEQ_LEN
    moved = batch.to("meta")
    assert moved.input_ids.device.type == "meta" and moved.position_ids is None and moved.positions == (0, 1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        batch.num_targets = 0  # type: ignore[misc]
