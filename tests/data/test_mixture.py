"""Mixtures: their order at any place, what a person may write for one, and what does not go together."""

import json
from fractions import Fraction

import numpy as np
import pytest
from shard_folders import SEQ_LEN, make_documents, write
from stream_hash import hash_stream

from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader, order_windows
from minimind.data.mixture import NamedShards, open_mixture, read_mixture, read_schedule
from minimind.data.mixture_order import MOST_PARTS, MixtureOrder, balanced_period, whole_parts
from minimind.data.shards import ShardReader
from minimind.data.shuffle import ShuffledOrder
from minimind.errors import UserError


class Corpus:
    """What an order has to know of a source."""

    def __init__(self, number: int, num_windows: int, most_windows: int | None = None):
        self.name, self.fingerprint = f"s{number}", f"{number:064}"
        self.num_windows, self.most_windows = num_windows, most_windows


def order_of(weights, sizes, limits=None, *, shares=(), taken=None) -> MixtureOrder:
    limits = limits or [None] * len(sizes)
    corpora = [Corpus(i, size, most) for i, (size, most) in enumerate(zip(sizes, limits, strict=True))]
    shares = [(0, fractions(weights)), *((place, fractions(others)) for place, others in shares)]
    return MixtureOrder(corpora, 7, shares, taken or {})


def fractions(weights) -> list[Fraction]:
    return [Fraction(str(weight)) for weight in weights]


def sources_of(order: MixtureOrder, windows: np.ndarray) -> np.ndarray:
    return np.searchsorted(order.first_windows, windows, side="right") - 1


def worst_gap(chosen: np.ndarray, weights) -> float:
    """The furthest that any source is from its share, in windows, over all places."""
    share = np.array(weights, dtype=float) / sum(map(float, weights))
    places = np.arange(1, len(chosen) + 1)
    return max(float(np.abs(np.cumsum(chosen == i) - places * share[i]).max()) for i in range(len(share)))


RANDOM = np.random.default_rng(0).dirichlet(np.ones(20))
SKEWED = [round(0.62**i + 0.0007, 4) for i in range(20)]


@pytest.mark.parametrize(
    "weights",
    [SKEWED, [1] * 20, [0.5, *[0.0263] * 18, 0.0266], list(range(1, 21)), RANDOM],
    ids=["skewed", "equal", "one heavy", "linear", "any floats"],
)  # fmt: skip
def test_every_source_is_within_one_window_of_its_share_at_each_of_a_million_places(weights):
    order = order_of(weights, [1000 + i for i in range(20)])
    # Of floats of 17 digits the shares are those of the rounded parts.
    asked = whole_parts(fractions(weights))
    period = balanced_period(asked)[0]
    chosen = np.resize(period, 1_000_000)
    places = np.random.default_rng(0).integers(0, 1_000_000, 50_000)
    np.testing.assert_array_equal(sources_of(order, order[places]), chosen[places])
    assert worst_gap(chosen, asked) < 1
    if sum(asked) < MOST_PARTS:
        assert worst_gap(chosen, weights) < 1 + 1e-6
    else:
        assert np.abs(np.array(asked) / sum(asked) - weights).max() < 1 / MOST_PARTS


def test_a_draw_or_rounding_would_not_keep_that_bound():
    weights = SKEWED
    drawn = np.random.default_rng(0).choice(20, 100_000, p=np.array(weights) / sum(weights))
    assert worst_gap(drawn, weights) > 10
    period = balanced_period(whole_parts(fractions(weights)))[0]
    assert worst_gap(np.sort(period), weights) > 10  # all of one source, then all of the next


def test_parts_are_the_weights_exactly_or_rounded_to_the_longest_period():
    assert whole_parts(fractions([0.6, 0.3, 0.1])) == (6, 3, 1)
    assert whole_parts(fractions([2, 0, 4])) == (1, 0, 2)
    parts = whole_parts([Fraction(1, 3**12), Fraction(1), Fraction(1, 7**9)])
    assert sum(parts) <= MOST_PARTS and min(parts) >= 1


def test_a_place_is_a_pure_function_and_each_source_is_passed_over_in_its_own_order():
    order = order_of([0.5, 0.3, 0.2], [97, 40, 1000])
    places = np.arange(2000)
    windows = order[places]
    np.testing.assert_array_equal(windows, order_of([0.5, 0.3, 0.2], [97, 40, 1000])[places[::-1]][::-1])
    np.testing.assert_array_equal(order[places.reshape(40, 50)].ravel(), windows)
    for number, size in enumerate((97, 40, 1000)):
        own = windows[sources_of(order, windows) == number] - order.first_windows[number]
        np.testing.assert_array_equal(own, ShuffledOrder(size, 7, f"{number:064}")[np.arange(len(own))])
        for epoch in range(len(own) // size):
            assert sorted(own[epoch * size : (epoch + 1) * size]) == list(range(size))


def test_what_was_taken_is_counted_at_any_place():
    order = order_of([0.5, 0.3, 0.2], [97, 40, 1000], [None, 100, None], shares=[(500, [1, 1, 0]), (900, [0, 1, 3])])
    windows = order[np.arange(1500)]
    chosen = sources_of(order, windows)
    for place in (0, 1, 7, 499, 500, 501, 777, 899, 900, 1500):
        counts = np.bincount(chosen[:place], minlength=3).tolist()
        assert list(order.taken(place).values()) == counts


def test_a_source_that_runs_dry_leaves_its_share_to_the_others():
    order = order_of([0.5, 0.3, 0.2], [97, 40, 1000], [97, None, None])
    chosen = sources_of(order, order[np.arange(3000)])
    (last,) = np.flatnonzero(np.cumsum(chosen == 0) == 97)[:1]
    assert (chosen == 0).sum() == 97 and order.phases[1].start == last + 1 and order.phases[1].dry == (0,)
    assert worst_gap(chosen[: last + 1], [5, 3, 2]) < 1 and worst_gap(chosen[last + 1 :] - 1, [3, 2]) < 1
    assert order.end is None
    ending = order_of([1, 1], [10, 20], [15, 20])
    assert ending.end == 35 and sorted(np.bincount(sources_of(ending, ending[np.arange(35)]))) == [15, 20]
    with pytest.raises(UserError, match="run dry after 35 windows"):
        ending[np.array([35])]


def test_shares_change_at_their_place_and_sources_go_on_where_they_stood():
    order = order_of([0.9, 0.1, 0], [97, 40, 1000], shares=[(100, [0.1, 0.1, 0.8]), (300, [1, 0, 0])])
    windows = order[np.arange(400)]
    chosen = sources_of(order, windows)
    assert worst_gap(chosen[:100], [9, 1, 0]) < 1 and worst_gap(chosen[100:300], [1, 1, 8]) < 1
    assert set(chosen[300:]) == {0}
    for number, size in enumerate((97, 40, 1000)):
        own = windows[chosen == number] - order.first_windows[number]
        np.testing.assert_array_equal(own, ShuffledOrder(size, 7, f"{number:064}")[np.arange(len(own))])
    # The same change, at a resume: another order, which is told what was taken.
    later = order_of([0.1, 0.1, 0.8], [97, 40, 1000], shares=[(200, [1, 0, 0])], taken=order.taken(100))
    np.testing.assert_array_equal(later[np.arange(300)], windows[100:])


@pytest.fixture(scope="module")
def readers(tmp_path_factory) -> dict[str, ShardReader]:
    folder = tmp_path_factory.mktemp("sources")
    (folder / "tokenizer.model").write_bytes(b"t")
    for number, name in enumerate(("web", "code", "zh")):
        write(folder / name, folder / "tokenizer.model", make_documents(40 + 30 * number, seed=number))
    return {name: ShardReader(folder / name) for name in ("web", "code", "zh")}


NAMED = tuple(
    NamedShards(name, "", weight) for name, weight in zip(("web", "code", "zh"), fractions([6, 3, 1]), strict=True)
)


def test_every_world_size_takes_the_same_windows_of_a_mixture(readers):
    mixture = open_mixture(NAMED, readers, [(5, fractions([0, 1, 1]))], SEQ_LEN)
    alone = BatchLoader(mixture, 5, 12, 12)
    for world_size, micro in ((2, 3), (3, 4), (3, 2), (4, 1)):
        loaders = [BatchLoader(mixture, 5, micro, 12, rank, world_size) for rank in range(world_size)]
        for step in (0, 4, 5, 1000):
            total = sum(hash_stream(loader.step_batches(step)) for loader in loaders)
            assert (total - hash_stream(alone.step_batches(step))) % 2**64 == 0


def test_batches_say_of_which_source_their_windows_are(readers):
    mixture = open_mixture(NAMED, readers, [], SEQ_LEN)
    (batch,) = BatchLoader(mixture, 5, 10, 10).step_batches(3)
    assert batch.num_sources == 3 and np.bincount(batch.sources, minlength=3).tolist() == [6, 3, 1]
    windows = {name: TokenDataset(reader, SEQ_LEN) for name, reader in readers.items()}
    for number, row in zip(batch.sources.tolist(), batch.input_ids, strict=True):
        own = windows[NAMED[number].name]
        assert any((own[i].input_ids == row.numpy()).all() for i in range(len(own)))


def test_a_plain_folder_has_the_order_that_it_always_had(dataset):
    np.testing.assert_array_equal(
        order_windows(dataset, 5, 12)[np.arange(300)],
        ShuffledOrder(len(dataset), 5, dataset.reader.fingerprint)[np.arange(300)],
    )
    # Pinned: runs of before continue.
    order = ShuffledOrder(1000, 5, "x")[np.arange(5)]
    assert order.tolist() == PINNED


PINNED = [605, 667, 87, 152, 387]


def test_a_run_on_one_source_of_a_mixture_goes_on_where_that_stood(readers):
    mixture = open_mixture(NAMED, readers, [], SEQ_LEN)
    taken = BatchLoader(mixture, 5, 4, 4).taken(50)
    web = TokenDataset(readers["web"], SEQ_LEN)
    later = BatchLoader(web, 5, 4, 4, first_step=50, taken=taken)
    assert taken[web.fingerprint] == 120
    np.testing.assert_array_equal(
        later.order[np.arange(9)], ShuffledOrder(len(web), 5, web.fingerprint)[np.arange(120, 129)]
    )
    assert later.taken(60) == taken | {web.fingerprint: 160}


def test_sources_are_read_from_flags_and_from_files(tmp_path):
    wanted = (
        NamedShards("web", "data/web", Fraction(6, 10)),
        NamedShards("code", "s3://bucket/code", Fraction(3, 10), Fraction(4)),
    )
    assert read_mixture(("web=data/web:0.6", "code=s3://bucket/code:0.3:max-epochs=4")) == wanted
    content = {"web": {"path": "data/web", "weight": 0.6}}
    content["code"] = {"path": "s3://bucket/code", "weight": 0.3, "max_epochs": 4}
    (tmp_path / "mix.json").write_text(json.dumps(content))
    (tmp_path / "mix.yaml").write_text("web: {path: data/web, weight: 0.6}\ncode:\n  path: s3://bucket/code\n"
                                       "  weight: 0.3\n  max_epochs: 4\n")  # fmt: skip
    assert read_mixture(str(tmp_path / "mix.json")) == read_mixture((str(tmp_path / "mix.yaml"),)) == wanted
    (tmp_path / "a=b:1").mkdir()
    for plain in ("data/web", str(tmp_path / "a=b:1"), str(tmp_path / "nowhere")):
        assert read_mixture(plain) is None


@pytest.mark.parametrize(
    ("values", "words"),
    [
        (("data/web", "data/code"), "shards: data/web is not NAME=DIR:WEIGHT"),
        (("web=data/web", "code=data/code:1"), "shards: web=data/web is not NAME=DIR:WEIGHT"),
        (("web=data/web:x", "code=data/code:1"), "shards: web: weight x is not a number of 0 or more"),
        (("web=data/web:-1", "code=data/code:1"), "shards: web: weight -1 is not a number"),
        (("web=data/web:1:max-epochs=0", "code=data/code:1"), "shards: web: max-epochs 0 is not a number above 0"),
        (("web=data/web:1", "web=data/code:1"), "shards: web names two sources"),
        (("web=data/web:0", "code=data/code:0"), "shards: every weight is 0"),
    ],
)
def test_a_mixture_of_another_form_is_refused(values, words):
    with pytest.raises(UserError) as refusal:
        read_mixture(values)
    assert words in str(refusal.value) and "\n" not in str(refusal.value)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"step": 1}, "not a list of"),
        ([{"step": 5, "weight": {}}], "not a list of"),
        ([{"step": 0, "weights": {"web": 1}}], "step 0 is not a whole number above 0"),
        ([{"step": 5, "weights": {"web": 1}}] * 2, "step 5 is not a whole number above 5"),
        ([{"step": 5, "weights": {"wob": 1}}], "no source 'wob'; did you mean 'web'?"),
        ([{"step": 5, "weights": {"web": "a"}}], "web: weight a is not a number"),
        ([{"step": 5, "weights": {"web": 0}}], "step 5: every weight is 0"),
    ],
)  # fmt: skip
def test_a_schedule_of_another_form_is_refused(tmp_path, content, words):
    (tmp_path / "s.json").write_text(json.dumps(content))
    with pytest.raises(UserError) as refusal:
        read_schedule(str(tmp_path / "s.json"), ["web", "code"])
    assert words in str(refusal.value) and "\n" not in str(refusal.value)
    (tmp_path / "good.yaml").write_text("- step: 5\n  weights: {code: 0.25}\n")
    assert read_schedule(str(tmp_path / "good.yaml"), ["web", "code"]) == [(5, (Fraction(0), Fraction(1, 4)))]


def test_sources_that_do_not_go_together_are_refused(readers, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(b"another")
    write(tmp_path / "train", tmp_path / "tokenizer.model", make_documents(60))
    named = (NamedShards("web", "", Fraction(1)), NamedShards("other", "", Fraction(1)))
    for reader, words in (
        (ShardReader(tmp_path / "train"), "other .* has another tokenizer than"),
        (readers["web"], "web and other hold the same tokens"),
    ):
        with pytest.raises(UserError, match=words):
            open_mixture(named, {"web": readers["web"], "other": reader}, [], SEQ_LEN)
