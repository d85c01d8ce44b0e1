"""The windows of a run: one corpus or a mixture, opened, checked, and in words."""

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from pathlib import Path

from minimind.config.run_config import RunConfig
from minimind.data.dataset import Dataset, open_dataset
from minimind.data.mixture import FORM, Mixture, NamedShards, open_mixture, read_mixture, read_schedule
from minimind.data.mixture_order import MOST_PARTS, MixtureOrder
from minimind.data.shards import ShardReader, find_parts, find_split, open_split
from minimind.data.shuffle import ShuffledOrder
from minimind.distributed.collectives import log
from minimind.distributed.environment import RankEnvironment
from minimind.errors import UserError
from minimind.training.choose_objective import check_kind
from minimind.training.run_folder import recorded_fingerprints
from minimind.units import format_table


@dataclass(frozen=True)
class RunData:
    """The windows of a run."""

    train: Dataset
    val: Dataset | None
    """None: the corpus has no validation split."""

    def check_files(self, env: RankEnvironment) -> None:
        """Compare this rank's share of the shards with their manifests, by size and header.

        Raises:
            ShardError: naming the file that is missing or damaged.
        """
        for reader in (
            reader for dataset in (self.train, self.val) if dataset is not None for reader in dataset.readers
        ):
            reader.check_files(env.rank, env.world_size, lists=env.local_rank == 0)


def open_data(run: RunConfig, *, check: bool = True) -> RunData:
    """Open the splits of a corpus, or of each source of a mixture; with `check` every file is compared with its
    manifest.

    Raises:
        UserError: no shards, damaged ones, or ones that do not fit the run.
    """
    named = read_sources(run)
    folders = {source.name: Path(source.folder) for source in named}
    opened = {source.name: open_splits(run, Path(source.folder), check=check) for source in named}
    train = {name: readers[0] for name, readers in opened.items()}
    val = {name: reader for name, (_, reader) in opened.items() if reader is not None}
    if not val and (run.train.eval_every or run.train.eval_samples):
        where = " and ".join(map(str, folders.values()))
        raise UserError(f"eval_every: {where} has no validation split; prepare one, or leave out the --eval flags")
    for name, reader in train.items():
        if (vocab := reader.manifest.vocab_size) > run.model.vocab_size:
            raise UserError(
                f"vocab_size: the shards of {folders[name]} have {vocab} tokens and the model only "
                f"{run.model.vocab_size}; pass --vocab-size {vocab}"
            )
    alone = any([check_kind(run.train, reader) for reader in train.values()])
    return RunData(
        join_windows(run, named, train, alone=alone),
        join_windows(run, named, val, keep_tail=True, alone=alone) if val else None,
    )


def open_splits(run: RunConfig, folder: Path, *, check: bool) -> tuple[ShardReader, ShardReader | None]:
    """The training and the validation split of a corpus, if it has one; of one that has grown since the run began, the
    shards that it began with."""
    parts = run.data.corpus_parts
    train = open_split(folder, "train", check=check, parts=parts)
    if parts is None and (parts := find_parts(train.manifest, recorded_fingerprints(run.train))) is not None:
        log(f"{folder} has grown: the run goes on with the shards it began with (--allow-data-change takes the others)")
        train = open_split(folder, "train", check=False, parts=parts)
    val = open_split(folder, "val", check=check, parts=parts) if find_split(folder, "val") else None
    if val is not None and parts is not None and not val.num_tokens:
        val = None  # a later part brought the first of it
    return train, val


def read_sources(run: RunConfig) -> tuple[NamedShards, ...]:
    """The corpora that a run reads; a single plain folder has no name.

    Raises:
        UserError: there are none, or they are named wrongly.
    """
    shards, schedule = run.data.shards, run.data.mixture_schedule
    if shards is None:
        raise UserError("shards: not given; pass --shards DIR, a folder made by python -m data_prep.tokenize_corpus")
    named = read_mixture(shards)
    if named is not None:
        if run.data.corpus_parts is not None:
            raise UserError(f"corpus_parts: {run.data.corpus_parts} is of one corpus, not of a mixture; leave it out")
        return named
    if schedule is not None:
        raise UserError(f"mixture_schedule: {schedule} is for a mixture; name its sources by --shards {FORM}")
    return (NamedShards("", shards if isinstance(shards, str) else shards[0], Fraction(1)),)


def join_windows(
    run: RunConfig,
    named: Sequence[NamedShards],
    readers: Mapping[str, ShardReader],
    *,
    keep_tail: bool = False,
    alone: bool = False,
) -> Dataset:
    """The windows of a split; arguments as of `open_dataset`.

    Raises:
        UserError: a source is too small, or does not go with the others.
    """
    seq_len, mask, packed = run.data.seq_len, run.data.document_mask, run.data.packing == "whole-documents"
    if "" in readers:
        return open_dataset(readers[""], seq_len, mask, packed=packed, keep_tail=keep_tail, alone=alone)
    if alone:
        raise UserError("objective: grpo learns from one folder of conversations, not from a mixture; give one")
    schedule = read_schedule(run.data.mixture_schedule, [source.name for source in named])
    return open_mixture(named, readers, schedule, seq_len, mask, packed=packed, keep_tail=keep_tail)


Order = ShuffledOrder | MixtureOrder


def check_length(order: Order, steps: int, global_batch_size: int) -> None:
    """Refuse a run that is longer than its mixture, every source of which has a limit. Raises `UserError`."""
    if isinstance(order, MixtureOrder) and order.end is not None and order.end < steps * global_batch_size:
        raise UserError(
            f"shards: every source runs dry after {order.end // global_batch_size:,} of {steps:,} steps; raise "
            "max-epochs, add data, or lower --steps"
        )


def describe_mixture(
    dataset: Dataset, order: Order, global_batch_size: int, steps: int, first_step: int = 0
) -> list[str]:
    """What each source of a mixture gives to a run of `steps` steps, and where that changes, a line each; nothing for a
    single corpus."""
    if not isinstance(dataset, Mixture) or not isinstance(order, MixtureOrder):
        return []
    names = [source.name for source in dataset.sources]
    places = (steps - first_step) * global_batch_size
    before, after = order.taken(0), order.taken(places)
    rows = [["mixture ", "source", "share", "tokens", "read", "epochs", "steps", ""]]
    for number, (source, reader) in enumerate(zip(dataset.sources, dataset.readers, strict=True)):
        windows = after[source.fingerprint] - before.get(source.fingerprint, 0)
        limit = "" if source.max_epochs is None else f" of {float(source.max_epochs):g}"
        cells = [
            f"{_shares(order.phases[0].parts)[number]:.2%}", f"{reader.num_tokens:,}",
            f"{windows * dataset.seq_len:,}", f"{after[source.fingerprint] / source.num_windows:.2f}{limit}",
            f"{windows / global_batch_size:,.1f}", str(reader.folder),
        ]  # fmt: skip
        rows.append(["", source.name, *cells])
    lines = format_table(rows, "<<>>>>><").splitlines()
    for earlier, phase in itertools.pairwise(order.phases):
        if phase.start >= places:
            break
        new = [names[number] for number in phase.dry if number not in earlier.dry]
        why = f"{' and '.join(new)} {'have' if len(new) > 1 else 'has'} run dry: " if new else ""
        shares = [f"{name} {share:.2%}" for name, share in zip(names, _shares(phase.parts), strict=True) if share]
        lines.append(f"          from step {first_step + phase.start // global_batch_size:,}: {why}{', '.join(shares)}")
    if any(sum(phase.parts) == MOST_PARTS for phase in order.phases):
        lines.append(f"          shares are rounded to {MOST_PARTS:,} parts; shorter weights are taken exactly")
    return lines


def _shares(parts: Sequence[int]) -> list[float]:
    return [part / sum(parts) for part in parts]
