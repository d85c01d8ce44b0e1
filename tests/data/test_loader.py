"""The global order, and which rank takes what."""

import dataclasses
import itertools
import threading
import tracemalloc

import numpy as np
import pytest
import torch
from shard_folders import SEQ_LEN, make_documents, write
from stream_hash import hash_stream

from minimind.data.dataset import IGNORED_LABEL, WHOLE, PackedDataset, SequencePart, TokenDataset
from minimind.data.loader import Batch, BatchLoader, eval_batches
from minimind.data.manifest import ShardError
from minimind.data.shards import ShardReader
from minimind.data.shuffle import ShuffledOrder
from minimind.errors import UserError

FROZEN_ORDER = [151203, 792347, 857318, 189059, 35870, 319443]


@pytest.mark.parametrize("n", [*range(1, 70), 127, 128, 129, 997, 1000, 1024, 4096, 10_007, 65_536, 65_537, 99_999])
def test_each_epoch_is_a_permutation(n):
    order = ShuffledOrder(n, seed=3, fingerprint="f")
    for epoch in (0, 1, 10**6):
        indices = order[np.arange(epoch * n, (epoch + 1) * n)]
        np.testing.assert_array_equal(np.sort(indices), np.arange(n))


def test_a_place_does_not_depend_on_what_else_is_asked():
    order = ShuffledOrder(1000, seed=1, fingerprint="f")
    together = order[np.arange(500, 3500)]
    np.testing.assert_array_equal(together, [int(order[np.array(p)]) for p in range(500, 3500)])
    np.testing.assert_array_equal(together, ShuffledOrder(1000, seed=1, fingerprint="f")[np.arange(500, 3500)])
    np.testing.assert_array_equal(order[np.arange(6).reshape(2, 3)].shape, (2, 3))


def test_the_order_never_changes():
    """These figures are part of the promise: a run that is resumed by a later version sees the same samples."""
    order = ShuffledOrder(1_000_003, seed=42, fingerprint="0" * 64)
    assert order[np.array([0, 1, 2, 1_000_002, 1_000_003, 10**15])].tolist() == FROZEN_ORDER


def test_seed_epoch_and_fingerprint_each_change_the_order():
    places = np.arange(1000)
    base = ShuffledOrder(1000, 1, "a")
    others = [ShuffledOrder(1000, 2, "a")[places], ShuffledOrder(1000, 1, "b")[places], base[places + 1000]]
    for other in others:
        assert np.count_nonzero(other == base[places]) < 12  # 1 is expected of two independent permutations


def test_the_order_looks_random():
    n = 2**16 + 1
    indices = ShuffledOrder(n, 7, "f")[np.arange(n)]
    steps = np.diff(indices)
    # In a random permutation about one neighbour pair in n follows on: Poisson with mean 1.
    assert np.count_nonzero(steps == 1) < 8 and np.count_nonzero(steps == -1) < 8
    assert np.count_nonzero(indices == np.arange(n)) < 8
    assert abs(np.corrcoef(indices[:-1], indices[1:])[0, 1]) < 0.02  # 5 sigma of 1/sqrt(n)
    assert abs(np.corrcoef(np.arange(n), indices)[0, 1]) < 0.02
    # Differences of neighbours, modulo n, fill 64 bins evenly: chi-square of 63 degrees, 5 sigma above its mean.
    counts = np.bincount((steps % n) * 64 // n, minlength=64)
    assert ((counts - n / 64) ** 2 / (n / 64)).sum() < 63 + 5 * np.sqrt(2 * 63)


@pytest.mark.parametrize("n", [2, 3, 5, 50])
def test_every_sample_comes_first_equally_often(n):
    epochs = 4000
    firsts = ShuffledOrder(n, 5, "f")[np.arange(epochs) * n]
    counts = np.bincount(firsts, minlength=n)
    assert ((counts - epochs / n) ** 2 / (epochs / n)).sum() < (n - 1) + 5 * np.sqrt(2 * (n - 1))


def test_a_trillion_samples_need_no_memory():
    order = ShuffledOrder(10**12, 1, "f")
    order[np.arange(2)]
    tracemalloc.start()
    indices = order[10**11 + np.arange(1000)]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 500_000
    assert len(set(indices.tolist())) == 1000 and indices.min() >= 0 and indices.max() < 10**12
    assert indices.max() - indices.min() > 9 * 10**11


def windows_of(batches: list[Batch]) -> dict[int, tuple[bytes, bytes]]:
    rows = {}
    for batch in batches:
        for position, inputs, labels in zip(batch.positions, batch.input_ids, batch.labels, strict=True):
            assert position not in rows
            rows[position] = (inputs.numpy().tobytes(), labels.numpy().tobytes())
    return rows


@pytest.mark.parametrize(
    ("world_size", "micro"), [(1, 12), (1, 4), (1, 1), (2, 6), (2, 3), (2, 1), (3, 4), (3, 2), (4, 3), (4, 1), (6, 2)]
)
def test_every_world_size_and_accumulation_sees_the_same_stream(dataset, world_size, micro):
    alone = BatchLoader(dataset, 5, 12, 12)
    loaders = [BatchLoader(dataset, 5, micro, 12, rank, world_size) for rank in range(world_size)]
    for step in (0, 1, 2, len(dataset) // 12, 1000):
        ranks = [loader.step_batches(step) for loader in loaders]
        assert all(len(batches) == 12 // (micro * world_size) for batches in ranks)
        # Read micro-batch by micro-batch across the ranks, the places follow one another.
        places = [p for together in zip(*ranks, strict=True) for batch in together for p in batch.positions]
        assert places == list(range(12 * step, 12 * step + 12))
        assert windows_of([b for batches in ranks for b in batches]) == windows_of(alone.step_batches(step))
        total = sum(hash_stream(batches) for batches in ranks)
        assert (total - hash_stream(alone.step_batches(step))) % 2**64 == 0


def test_an_epoch_takes_every_window_once_and_the_next_in_another_order(dataset):
    loader = BatchLoader(dataset, 5, 1, 1)
    epochs = [[loader.step_batches(e * len(dataset) + i)[0] for i in range(len(dataset))] for e in range(2)]
    contents = [[batch.input_ids.numpy().tobytes() for batch in epoch] for epoch in epochs]
    everything = sorted(dataset[i].input_ids.tobytes() for i in range(len(dataset)))
    assert sorted(contents[0]) == sorted(contents[1]) == everything
    assert contents[0] != contents[1]


def test_a_step_larger_than_an_epoch_wraps(dataset):
    size = len(dataset) + 5
    batch = BatchLoader(dataset, 5, size, size).step_batches(0)[0]
    rows = [row.numpy().tobytes() for row in batch.input_ids]
    assert len(set(rows[: len(dataset)])) == len(dataset) and len(rows) == size


def test_the_stream_hash_sees_every_difference(dataset):
    loader = BatchLoader(dataset, 5, 4, 4)
    base = hash_stream(loader.step_batches(0))
    (batch,) = loader.step_batches(0)
    labels, inputs = batch.labels.clone(), batch.input_ids.clone()
    labels[2, 3] += 1
    inputs[0, 0] += 1
    changed = [
        loader.step_batches(1),
        BatchLoader(dataset, 6, 4, 4).step_batches(0),
        [dataclasses.replace(batch, labels=labels)],
        [dataclasses.replace(batch, input_ids=inputs)],
        [dataclasses.replace(batch, positions=(0, 1, 3, 2))],
        [],
    ]
    assert all(hash_stream(batches) != base for batches in changed)
    assert -(2**63) <= base < 2**63 and base == hash_stream(loader.step_batches(0))


@pytest.mark.parametrize(("micro", "total", "world_size"), [(4, 10, 1), (4, 12, 2), (0, 8, 1), (4, 0, 1), (8, 4, 1)])
def test_a_batch_that_does_not_divide_is_refused(dataset, micro, total, world_size):
    with pytest.raises(UserError, match=f"global_batch_size {total}"):
        BatchLoader(dataset, 5, micro, total, 0, world_size)


def loader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name.startswith("batch-loader")]


@pytest.mark.parametrize("start", [0, 7, 12345])
def test_iterating_resumes_at_any_step(dataset, start):
    loader = BatchLoader(dataset, 5, 2, 4)
    batches = loader.iterate(start)
    for step in range(start, start + 5):
        assert hash_stream(next(batches)) == hash_stream(loader.step_batches(step))
    assert len(loader_threads()) == 1
    batches.close()
    assert loader_threads() == []


def test_a_forgotten_iterator_leaves_no_thread(dataset):
    batches = BatchLoader(dataset, 5, 2, 4).iterate()
    next(batches)
    del batches
    assert loader_threads() == []


def test_an_error_of_reading_comes_at_its_step(tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"t")
    write(tmp_path / "train", tmp_path / "tokenizer.model", make_documents(60))

    class Failing(TokenDataset):
        reads = 0

        def read(self, index: int, part: SequencePart = WHOLE):
            self.reads += 1
            if self.reads > 3:
                raise ShardError("shard_00001.npy is damaged")
            return super().read(index, part)

    batches = BatchLoader(Failing(ShardReader(tmp_path / "train"), SEQ_LEN), 5, 1, 1).iterate()
    for _ in range(3):
        next(batches)
    with pytest.raises(ShardError, match="damaged"):
        next(batches)
    assert loader_threads() == []


def test_the_next_step_is_read_while_this_one_is_used(dataset):
    second_read = threading.Event()

    class Watched(TokenDataset):
        reads = 0

        def read(self, index: int, part: SequencePart = WHOLE):
            self.reads += 1
            if self.reads == 2:
                second_read.set()
            return super().read(index, part)

    batches = BatchLoader(Watched(dataset.reader, SEQ_LEN), 5, 1, 1).iterate()
    next(batches)
    assert second_read.wait(timeout=60)
    batches.close()


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("micro", [1, 3, 8])
@pytest.mark.parametrize("max_samples", [None, 1, 10, 10**6])
@pytest.mark.parametrize("document_mask", [False, True])
def test_evaluation_takes_every_window_once_on_any_number_of_ranks(
    reader, world_size, micro, max_samples, document_mask
):
    dataset = TokenDataset(reader, SEQ_LEN, document_mask, keep_tail=True)
    ranks = [
        list(eval_batches(dataset, micro, rank, world_size, max_samples=max_samples)) for rank in range(world_size)
    ]
    assert len({len(batches) for batches in ranks}) == 1  # collectives match
    seen = {}
    for batch in itertools.chain(*ranks):
        assert batch.input_ids.shape == (micro, SEQ_LEN)
        assert batch.num_targets == int((batch.labels != IGNORED_LABEL).sum())
        assert (batch.cu_seqlens is not None) == document_mask
        for position, labels in zip(batch.positions, batch.labels, strict=True):
            if position == -1:
                assert (labels == IGNORED_LABEL).all()
            else:
                assert position not in seen
                seen[position] = labels.numpy()
    taken = min(len(dataset), max_samples or len(dataset))
    assert sorted(seen) == list(range(taken))
    assert all(np.array_equal(seen[i], dataset[i].labels) for i in range(taken))
    filling = sum(batch.positions.count(-1) for batch in itertools.chain(*ranks))
    assert filling < micro * world_size


def test_shards_that_come_in_later_are_seen_from_the_beginning_of_their_order(dataset):
    first = BatchLoader(dataset, seed=1, micro_batch_size=2, global_batch_size=4)
    later = BatchLoader(dataset, seed=1, micro_batch_size=2, global_batch_size=4)
    later.first_step = 7
    for step in range(len(dataset) // 4 + 1):
        for a, b in zip(first.step_batches(step), later.step_batches(step + 7), strict=True):
            assert a.positions == b.positions and torch.equal(a.input_ids, b.input_ids)


@pytest.mark.parametrize("document_mask", [False, True])
@pytest.mark.parametrize("count", [2, 4, 8])
def test_the_parts_of_ranks_that_share_windows_are_the_windows(dataset, count, document_mask, monkeypatch):
    """Tokens, labels and positions side by side; borders those of whole windows; and no rank reads more."""
    masked = TokenDataset(dataset.reader, SEQ_LEN, document_mask, keep_tail=True)
    parts = [SequencePart(index, count) for index in range(count)]
    last = len(masked) - 1
    read = np.zeros(2, dtype=np.int64)
    real = ShardReader.read

    def watch(reader, start, length):
        read[:] += (length, 1)
        return real(reader, start, length)

    monkeypatch.setattr(ShardReader, "read", watch)
    for whole, shares in (
        (BatchLoader(masked, 5, 2, 4), [BatchLoader(masked, 5, 2, 4, part=part) for part in parts]),
        (BatchLoader(masked, 5, 2, 4, 1, 2), [BatchLoader(masked, 5, 2, 4, 1, 2, part) for part in parts]),
    ):
        for step in (0, last // 4):
            assert_parts(whole.step_batches(step), [share.step_batches(step) for share in shares], document_mask)
    assert_parts(
        list(eval_batches(masked, 2)), [list(eval_batches(masked, 2, part=part)) for part in parts], document_mask
    )
    read[:] = 0
    BatchLoader(masked, 5, 2, 4, part=parts[0]).step_batches(0)
    assert read[0] <= 4 * (SEQ_LEN // count + 1) and read[1] <= 4


def test_windows_come_in_parts_at_first_and_the_tokens_are_the_same(dataset):
    """Four, then two, then whole: on any number of ranks, and from any step on."""
    plain, growing = BatchLoader(dataset, 5, 2, 4), BatchLoader(dataset, 5, 2, 4, window_warmup_steps=4)
    shares = [BatchLoader(dataset, 5, 2, 4, rank, 2, window_warmup_steps=4) for rank in range(2)]
    for step, count in enumerate((4, 4, 2, 2, 1, 1)):
        found, wanted = growing.step_batches(step), plain.step_batches(step)
        for batch, whole in zip(found, wanted, strict=True):
            assert batch.input_ids.shape == (2 * count, SEQ_LEN // count) and batch.num_targets == whole.num_targets
            assert torch.equal(batch.input_ids.flatten(), whole.input_ids.flatten())
            assert torch.equal(batch.labels.flatten(), whole.labels.flatten())
        for batch, share in zip(found, shares, strict=True):  # of two micro-batches each rank has one
            assert torch.equal(batch.input_ids, share.step_batches(step)[0].input_ids)
    mixed = dataclasses.replace(plain.step_batches(0)[0], sources=torch.tensor([0, 1]), num_sources=2)
    assert mixed.in_parts(2).sources.tolist() == [0, 0, 1, 1]


def assert_parts(whole: list[Batch], shares: list[list[Batch]], document_mask: bool) -> None:
    for batch, parts in zip(whole, zip(*shares, strict=True), strict=True):
        for name in ("input_ids", "labels"):
            assert torch.equal(getattr(batch, name), torch.cat([getattr(part, name) for part in parts], dim=1)), name
        positions = batch.position_ids if document_mask else torch.arange(SEQ_LEN).expand(batch.input_ids.shape)
        assert torch.equal(positions, torch.cat([part.position_ids for part in parts], dim=1))
        assert batch.num_targets == sum(part.num_targets for part in parts)
        for part in parts:
            assert part.positions == batch.positions
            assert (part.cu_seqlens is None) == (batch.cu_seqlens is None)
            assert batch.cu_seqlens is None or torch.equal(part.cu_seqlens, batch.cu_seqlens)


@pytest.mark.parametrize("count", [2, 8])
def test_the_parts_of_packed_windows_are_the_windows(dataset, count):
    packed = PackedDataset(dataset.reader, SEQ_LEN)
    parts = [BatchLoader(packed, 5, 2, 4, part=SequencePart(index, count)) for index in range(count)]
    for step in (0, len(packed) // 4):
        assert_parts(BatchLoader(packed, 5, 2, 4).step_batches(step), [p.step_batches(step) for p in parts], True)


def test_a_rank_reads_its_part_of_a_window_of_a_million_tokens(tmp_path):
    """Order, labels, positions and borders hold; what is read and kept is a part."""
    (tmp_path / "tokenizer.model").write_bytes(b"t")
    rng, length = np.random.default_rng(0), 1_000_000
    write(
        tmp_path / "train",
        tmp_path / "tokenizer.model",
        [rng.integers(3, 200, 700_000) for _ in range(3)],
        shard_tokens=500_000,
    )
    dataset = TokenDataset(ShardReader(tmp_path / "train"), length, document_mask=True)
    assert len(dataset) == 2
    whole = BatchLoader(dataset, 5, 1, 1)
    shares = [BatchLoader(dataset, 5, 1, 1, part=SequencePart(index, 4)) for index in range(4)]
    for step in (0, 1):
        (batch,) = whole.step_batches(step)
        parts = [share.step_batches(step)[0] for share in shares]
        assert torch.equal(batch.labels, torch.cat([part.labels for part in parts], dim=1))
        assert torch.equal(batch.position_ids, torch.cat([part.position_ids for part in parts], dim=1))
        assert all(torch.equal(part.cu_seqlens, batch.cu_seqlens) for part in parts)
        assert parts[0].input_ids.shape == (1, 250_000) and batch.cu_seqlens[-1] == length
