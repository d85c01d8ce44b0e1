"""Save an engine's state from all ranks, at once or beside training.

DeepSpeed decides the content of each file; every rank writes its own into a partial folder. When all are flushed, the
manifest lists them, the folder gets its name, `latest` moves, and old checkpoints are deleted. A failure on one rank is
raised on all.
"""

import concurrent.futures
import dataclasses
import itertools
import shutil
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import deepspeed
import torch
from deepspeed.checkpoint.constants import UNIVERSAL_CHECKPOINT_VERSION_KEY, UNIVERSAL_CHECKPOINT_VERSION_VALUE

from minimind.checkpoints.engine_files import (
    HostCopies,
    States,
    count_bytes,
    record_written,
    use_state_files,
    write_states,
)
from minimind.checkpoints.folder import checkpoint_name, checkpoints_folder, point_latest
from minimind.checkpoints.manifest import (
    CLIENT_STATE_KEY,
    MANIFEST_NAME,
    CheckpointError,
    CheckpointManifest,
    FileRecord,
    TrainState,
    verify_files,
)
from minimind.checkpoints.remote_copies import store_checkpoint
from minimind.checkpoints.retention import prune
from minimind.checkpoints.run_state import DataFingerprint, describe_run
from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.collectives import broadcast_object, gather_objects, gather_on_first
from minimind.errors import UserError
from minimind.files import fsync_folder, partial_folder, publish, replace_file
from minimind.model.pretrained import TIED_NAME
from minimind.model.tuning import EMBEDDING
from minimind.parallel.loss_scale import read_grad_scaler

OFFLOADED_FOLDER = "offloaded_tensors"
"""Where DeepSpeed copies its NVMe swap files to."""
# A network file system may show a file of another host a little later.
SECONDS_UNTIL_VISIBLE = 60.0


class CheckpointSaver:
    """Saves the checkpoints of one run, one at a time. Every rank has one, and all call its methods together.

    Args:
        asynchronous: `start` only copies the state to host memory; writing goes on beside training.
    """

    def __init__(
        self, engine: deepspeed.DeepSpeedEngine, resolved: ResolvedRun, corpus: DataFingerprint, *, asynchronous: bool
    ) -> None:
        self._engine, self._resolved, self._corpus = engine, resolved, corpus
        self._root = checkpoints_folder(Path(resolved.train.run_dir))
        self._copies = HostCopies() if asynchronous else None
        self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._work: concurrent.futures.Future | None = None
        self._manifest = CheckpointManifest()
        self._partial = Path()
        self._publishing = False

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is on its way; the same on every rank."""
        return self._work is not None

    @property
    def is_idle(self) -> bool:
        """Whether this rank's share of the present stage is done; `advance` takes all ranks that say so further."""
        return self._work is None or self._work.done()

    def start(self, state: TrainState, *, eval_loss: float | None = None, probe_loss: float | None = None) -> None:
        """Take the engine's state and begin to write it; waits for the checkpoint before. Every rank calls this.

        A checkpoint of the same step is replaced: after a resume the same step was trained again.

        Raises:
            CheckpointError: on every rank: no room on the disk, or the folder cannot be written.
        """
        self.wait()
        self._prepare(state)
        self._manifest = CheckpointManifest(
            **dataclasses.asdict(state),
            **describe_run(self._resolved, self._corpus),
            eval_loss=eval_loss,
            probe_loss=probe_loss,
            versions={name: version(name) for name in ("torch", "deepspeed", "numpy")},
        )
        states = self._collect(state)
        self._check_room(states)
        if self._copies is not None:
            states = self._copies.copy(states)
        self._publishing = False
        self._work = self._pool.submit(_write, self._partial, states, torch.distributed.get_rank())

    def advance(self) -> Path | None:
        """Finish the present stage and begin the next; the checkpoint's folder when that was the last. Every rank
        calls this; it waits for those that are not idle.

        Raises:
            CheckpointError: on every rank, when one could not write; nothing that looks whole is left.
        """
        if self._work is None:
            return None
        records, failure = None, None
        try:
            records = self._work.result()
        except Exception as error:  # whatever it is, the other ranks must hear of it
            failure = f"rank {torch.distributed.get_rank()}: {_describe(error)}"
        self._work = None
        self._agree(failure)
        final = self._root / checkpoint_name(self._manifest.step)
        if self._publishing:
            return final
        self._publishing = True
        files = sorted(itertools.chain(*gather_on_first(records)), key=lambda record: record.path)
        manifest = dataclasses.replace(self._manifest, files=tuple(files))
        is_first = torch.distributed.get_rank() == 0
        self._work = self._pool.submit(self._publish, manifest, final) if is_first else self._pool.submit(bool)
        return None

    def wait(self) -> Path | None:
        """Bring the checkpoint that is on its way to its end and give its folder. Every rank calls this.

        Raises:
            CheckpointError: as `advance`.
        """
        folder = None
        while self.is_saving:
            folder = self.advance()
        return folder

    def close(self) -> None:
        """End the thread; it finishes what it writes."""
        self._pool.shutdown()

    def _prepare(self, state: TrainState) -> None:
        failure = None
        self._partial = broadcast_object(partial_folder(self._root / checkpoint_name(state.step)))
        if torch.distributed.get_rank() == 0:
            try:
                self._partial.mkdir(parents=True)
                for folder in (self._root, self._root.parent, self._root.parent.parent):
                    fsync_folder(folder)
            except OSError as error:
                failure = _describe(error)
        self._agree(failure)

    def _collect(self, state: TrainState) -> States:
        """What DeepSpeed would write on this rank. Its collectives run here, and nothing that may fail on one rank."""
        engine = self._engine
        content: dict[str, Any] = {**dataclasses.asdict(state), "shard_fingerprint": self._corpus.fingerprint}
        content["grad_scaler"] = read_grad_scaler(engine)
        if self._resolved.zero.stage == 0:
            # The optimizer's own state only numbers the parameters.
            groups = engine.optimizer.param_groups
            content["parameter_names"] = [[engine.param_names[param] for param in group["params"]] for group in groups]
        # DeepSpeed's conversion to its universal format asks for this; it is silent about it until then.
        engine.module.universal_checkpoint_info = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        keeps_frozen = self._resolved.train.keeps_frozen
        with use_state_files(engine) as files:
            engine.save_checkpoint(
                str(self._root),
                self._partial.name,
                {CLIENT_STATE_KEY: content},
                save_latest=False,
                exclude_frozen_parameters=keeps_frozen,
            )
        if keeps_frozen and self._resolved.model.tie_word_embeddings:
            # DeepSpeed leaves out a frozen matrix by its first name alone.
            for states in files.collected.values():
                if states.get("module") and EMBEDDING not in states["module"]:
                    states["module"].pop(TIED_NAME, None)
        return files.collected

    def _check_room(self, states: States) -> None:
        needed = sum(gather_objects(count_bytes(states)))
        failure = None
        if torch.distributed.get_rank() == 0:
            free = shutil.disk_usage(self._root).free
            if needed > free:
                failure = f"{self._root}: needs {needed / 1e9:.3g} GB and the disk has {free / 1e9:.3g} GB left"
        self._agree(failure)

    def _publish(self, manifest: CheckpointManifest, final: Path) -> None:
        """Give a written checkpoint its name, durably, and prune. Rank 0 alone; no collective inside."""
        train, run_dir = self._resolved.train, self._root.parent
        _wait_for_files(self._partial, manifest)
        for folder in {path.parent for path in self._partial.rglob("*")}:
            fsync_folder(folder)
        replace_file(self._partial / MANIFEST_NAME, manifest.to_json())
        publish(self._partial, final)
        point_latest(run_dir, final)
        try:
            prune(run_dir, keep_last=train.keep_last, keep_every=train.keep_every, keep_best=train.keep_best)
        except OSError as error:  # this one is saved all the same
            print(f"old checkpoints cannot be deleted: {_describe(error)}", flush=True)
        if train.store_checkpoints is not None:
            try:
                store_checkpoint(run_dir, final, train.store_checkpoints)
            except (UserError, OSError) as error:
                print(f"{final.name} is saved, and not stored: {error}; the next one is tried again", flush=True)

    def _agree(self, failure: str | None) -> None:
        """Stop on every rank when one has failed, leaving nothing half-written. Every rank calls this."""
        failures = [reason for reason in gather_objects(failure) if reason]
        if failures:
            if torch.distributed.get_rank() == 0:
                shutil.rmtree(self._partial, ignore_errors=True)
            raise CheckpointError(
                f"checkpoint not saved: {failures[0]}; free space or fix the folder, then resume the run"
            )


def _write(partial: Path, states: States, rank: int) -> list[FileRecord]:
    return write_states(partial, states) + record_written(partial, f"{OFFLOADED_FOLDER}/rank{rank:02d}")


def _wait_for_files(partial: Path, manifest: CheckpointManifest) -> None:
    """See from here what all ranks have written.

    Raises:
        CheckpointError: the ranks do not write into one file system; found at the first save, not at the resume.
    """
    deadline = time.monotonic() + SECONDS_UNTIL_VISIBLE
    while True:
        try:
            verify_files(partial, manifest, hashes=False)
            return
        except CheckpointError as error:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{error}, seen from rank 0; run_dir must be on a disk that all hosts share"
                ) from None
        time.sleep(0.5)


def _describe(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
