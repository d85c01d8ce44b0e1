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
from deepspeed.checkpoint.constants import (
    UNIVERSAL_CHECKPOINT_INFO,
    UNIVERSAL_CHECKPOINT_VERSION_KEY,
    UNIVERSAL_CHECKPOINT_VERSION_VALUE,
)

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
    verify_files,
)
from minimind.checkpoints.retention import prune
from minimind.checkpoints.run_state import DataFingerprint, TrainState, describe_layout, describe_sampling
from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.collectives import broadcast_object, gather_objects
from minimind.files import fsync_folder, partial_folder, publish, replace_file
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
        self._partial = self._root
        self._publishing = False

    @property
    def is_saving(self) -> bool:
        """Whether a checkpoint is on its way; the same on every rank."""
        return self._work is not None

    @property
    def is_idle(self) -> bool:
        """Whether this rank's share of the present stage is done; `advance` takes all ranks that say so further."""
        return self._work is None or self._work.done()

    def is_due(self, step: int) -> bool:
        """Whether `save_every` asks for a checkpoint after `step`."""
        every = self._resolved.train.save_every
        return bool(every and step % every == 0)

    def start(self, state: TrainState, *, eval_loss: float | None = None, probe_loss: float | None = None) -> None:
        """Take the engine's state and begin to write it; waits for the checkpoint before. Every rank calls this.

        A checkpoint of the same step is replaced: after a resume the same step was trained again.

        Raises:
            CheckpointError: on every rank: no room on the disk, or the folder cannot be written.
        """
        self.wait()
        self._prepare(state)
        resolved = self._resolved
        self._manifest = CheckpointManifest(
            **dataclasses.asdict(state),
            world_size=torch.distributed.get_world_size(),
            zero_stage=resolved.zero.stage,
            ep_size=resolved.train.ep_size,
            precision=resolved.train.precision,
            layout=describe_layout(resolved),
            shard_fingerprint=self._corpus.fingerprint,
            tokenizer_sha256=self._corpus.tokenizer_sha256,
            sampling=describe_sampling(resolved),
            eval_loss=eval_loss,
            probe_loss=probe_loss,
            model=resolved.model.to_dict(),
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
        files = sorted(itertools.chain(*gather_objects(records)), key=lambda record: record.path)
        self._publishing = True
        manifest = dataclasses.replace(self._manifest, files=tuple(files))
        is_first = torch.distributed.get_rank() == 0
        self._work = self._pool.submit(self._publish, manifest, final) if is_first else _nothing()
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
        partial = self._root
        if torch.distributed.get_rank() == 0:
            partial = partial_folder(self._root / checkpoint_name(state.step))
            try:
                partial.mkdir(parents=True)
                for folder in (self._root, self._root.parent, self._root.parent.parent):
                    fsync_folder(folder)
            except OSError as error:
                failure = _describe(error)
        self._partial = broadcast_object(partial)
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
        version_info = {UNIVERSAL_CHECKPOINT_VERSION_KEY: UNIVERSAL_CHECKPOINT_VERSION_VALUE}
        setattr(engine.module, UNIVERSAL_CHECKPOINT_INFO, version_info)
        with use_state_files(engine) as files:
            client_state = {CLIENT_STATE_KEY: content}
            engine.save_checkpoint(
                str(self._root), tag=self._partial.name, client_state=client_state, save_latest=False
            )
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
        train = self._resolved.train
        _wait_for_files(self._partial, manifest)
        for folder in {path.parent for path in self._partial.rglob("*")}:
            fsync_folder(folder)
        replace_file(self._partial / MANIFEST_NAME, manifest.to_json())
        publish(self._partial, final)
        point_latest(Path(train.run_dir), final)
        prune(Path(train.run_dir), keep_last=train.keep_last, keep_every=train.keep_every, keep_best=train.keep_best)

    def _agree(self, failure: str | None) -> None:
        """Stop on every rank when one has failed, leaving nothing half-written. Every rank calls this."""
        failures = [reason for reason in gather_objects(failure) if reason]
        if failures:
            if torch.distributed.get_rank() == 0 and self._partial != self._root:
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
            return verify_files(partial, manifest, hashes=False)
        except CheckpointError as error:
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{error}, seen from rank 0; run_dir must be on a disk that all hosts share"
                ) from None
        time.sleep(0.5)


def _nothing() -> concurrent.futures.Future:
    done: concurrent.futures.Future = concurrent.futures.Future()
    done.set_result(None)
    return done


def _describe(error: Exception) -> str:
    if isinstance(error, CheckpointError):
        return str(error)
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return f"{type(error).__name__}: {error}"
