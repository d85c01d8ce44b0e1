"""Which objective a run has, whether its data, flags and other models fit it, and how it is put together."""

from pathlib import Path

import torch

from minimind.checkpoints.formats.frozen_model import FrozenModel
from minimind.checkpoints.formats.init_from import find_init_checkpoint
from minimind.checkpoints.formats.source import open_source
from minimind.config.resolved_run import FrozenBase, ResolvedRun
from minimind.config.run_config import ObjectiveName, RunConfig, TrainConfig
from minimind.data.dataset import Dataset
from minimind.data.loader import BatchLoader
from minimind.data.shards import ShardReader
from minimind.data.tokenizer import load_tokenizer
from minimind.distributed.collectives import on_first_rank
from minimind.errors import UserError
from minimind.parallel.mesh import Mesh
from minimind.parallel.sequence import share_sequences
from minimind.training.objectives.distillation import Distillation, check_teacher
from minimind.training.objectives.grpo import GroupRelative
from minimind.training.objectives.objective import Objective
from minimind.training.objectives.preference import LOSSES, WITH_REFERENCE, Preference
from minimind.training.objectives.pretrain import Pretrain
from minimind.training.rewards.pool import check_rewards

_DISTILL = ("teacher_int8", "teacher_top_k", "distill_alpha", "distill_temperature", "distill_kl")
_OPTIONS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(_DISTILL, ("distill",)),
    **dict.fromkeys(("label_smoothing", "length_normalised"), ("dpo",)),
    **dict.fromkeys(("desirable_weight", "undesirable_weight"), ("kto",)),
    "target_margin": ("simpo",),
    **dict.fromkeys(("rollout_server", "rollout_seconds"), ("grpo",)),
    "reference": WITH_REFERENCE,
}
"""Settings that only these objectives read."""


def check_kind(train: TrainConfig, reader: ShardReader) -> bool:
    """Refuse shards that the objective cannot learn from; whether each window is to hold one conversation alone.

    Raises:
        UserError: naming the objective, and what the shards hold.
    """
    if (train.objective == "distill") != (train.teacher is not None):
        raise UserError(f"teacher: {train.teacher}; --objective distill and --teacher PATH are given together")
    folder, kind, objective = reader.folder, reader.manifest.kind, train.objective
    wanted = "feedback" if objective == "kto" else "preferences" if objective in LOSSES else None
    if objective is not None and kind != wanted:
        words = {"preferences": "pairs of answers", "feedback": "judged answers", None: "texts or conversations"}
        raise UserError(f"objective: {objective} learns from {words[wanted]}, and {folder} holds {words[kind]}")
    alone = objective == "grpo"
    if alone and not reader.manifest.is_chat:
        raise UserError(f"objective: grpo learns from questions in conversations, and {folder} holds texts")
    return alone


def check_objective(run: RunConfig, dataset: Dataset, sp_size: int, tp_size: int) -> None:
    """Refuse rewards, a teacher or a reference that cannot be, and what the objective would not read. Raises
    `UserError`."""
    objective, defaults = choose_objective(run.train, dataset), TrainConfig()
    for name, objectives in _OPTIONS.items():
        value = getattr(run.train, name)
        if objective not in objectives and value != getattr(defaults, name):
            raise UserError(
                f"{name}: {value} has no effect on {objective}, only on {', '.join(objectives)}; leave it out"
            )
    if sp_size > 1 and objective == "grpo":
        raise UserError(
            f"sp_size: {sp_size}: grpo samples whole answers on a rank; use --sp-size 1, with "
            "--activation-checkpointing or a higher ZeRO stage for memory"
        )
    if tp_size > 1 and objective == "grpo":
        raise UserError(
            f"tp_size: {tp_size}: {objective} samples and rewards answers on every rank by itself, and ranks that "
            "share layers must read the same; use --tp-size 1, and a higher ZeRO stage for memory"
        )
    check_rewards(run.train)
    if run.train.teacher is not None:
        check_teacher(run.train, dataset, run.model.vocab_size)
    if run.train.reference == "live" and run.train.init_from is None:
        raise UserError("reference: live is the model that --init-from names; give it, or leave --reference out")
    if run.train.reference == "live" or run.train.kl_coef:
        check_start_vocabulary(run)


def check_start_vocabulary(run: RunConfig) -> None:
    """Refuse to compare with a model that has more or fewer tokens. Raises `UserError`."""
    assert run.train.init_from is not None, "as checked before"
    there, here = open_source(Path(run.train.init_from), hashes=False).config.vocab_size, run.model.vocab_size
    if there != here:
        flag = "--kl-coef" if run.train.kl_coef else "--reference live"
        raise UserError(f"reference: {run.train.init_from} has {there} tokens, this run {here}; leave out {flag}")


def find_start(resolved: ResolvedRun) -> FrozenBase:
    """The model that `init_from` names, as rank 0 finds and verifies it. Every rank calls this."""
    train = resolved.train
    assert train.init_from is not None
    path = Path(train.init_from)
    return on_first_rank(lambda: find_init_checkpoint(resolved.model, path, keeps_frozen=train.keeps_frozen))


def choose_objective(train: TrainConfig, dataset: Dataset) -> ObjectiveName:
    """The objective that is asked for, or that of the data."""
    by_kind: dict[str | None, ObjectiveName] = {"preferences": "dpo", "feedback": "kto", None: "pretrain"}
    return train.objective or by_kind[dataset.reader.manifest.kind]


def make_objective(
    resolved: ResolvedRun, dataset: Dataset, device: torch.device, loader: BatchLoader, mesh: Mesh
) -> Objective:
    """What the run minimises."""
    name = choose_objective(resolved.train, dataset)
    if name == "pretrain":
        return Pretrain()
    train = resolved.train
    if name == "distill":
        assert train.teacher is not None, "as checked when the data was opened"
        where = ("teacher", Path(train.teacher), resolved, device)
        return Distillation(train, lambda: FrozenModel(*where, int8=train.teacher_int8), mesh)
    if name == "grpo":
        reader, start = dataset.reader, find_start(resolved) if train.kl_coef else None
        reference = None if start is None else FrozenModel("reference", Path(start.path), resolved, device)
        tokenizer = load_tokenizer(reader.folder / reader.manifest.tokenizer.file)
        return GroupRelative(resolved, tokenizer, loader, reference)
    reference = None
    if train.reference == "live":
        assert train.init_from is not None, "as checked when the data was opened"
        reference = FrozenModel("reference", Path(train.init_from), resolved, device)
        share_sequences(reference.model, mesh)
    return Preference(train, name, reference, mesh)
