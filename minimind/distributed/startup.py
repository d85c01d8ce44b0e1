"""How the ranks of a run meet: the store at rank 0's address, the preflight, the watchdog. One rank meets nobody.

Everything here has a time limit and names who is missing. Knows nothing of engines or of the loop.
"""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

import torch

from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.collectives import log
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.host_report import examine
from minimind.distributed.preflight import JOIN_MINUTES, announce_failure, run_preflight
from minimind.distributed.process_group import open_store
from minimind.distributed.store import node_name
from minimind.distributed.watchdog import Watchdog, hold_watchdog
from minimind.errors import OneRankError, UserError

ANNOUNCE_MINUTES = 0.25


@contextlib.contextmanager
def meet(
    resolved: ResolvedRun, env: RankEnvironment, device: torch.device, shards: str
) -> Iterator[tuple[torch.distributed.Store | None, Watchdog]]:
    """The store that the process group is made with, and the watchdog, held while the block runs. Every rank calls
    this.

    Args:
        shards: fingerprint of the training shards.

    Raises:
        UserError: a rank is missing, a host differs, or rank 0 cannot be reached.
    """
    train = resolved.train
    if env.world_size == 1:
        yield None, Watchdog()
        return
    join_minutes = min(JOIN_MINUTES, train.timeout_minutes)
    store = open_store(env, join_minutes)
    if train.preflight:
        run_dir = Path(train.run_dir)
        run_preflight(
            env,
            store,
            examine(env, device, run_dir, shards),
            run_dir,
            needed_bytes=resolved.checkpoint_bytes,
            join_minutes=join_minutes,
            say=log,
        )
    store.set_timeout(datetime.timedelta(minutes=train.timeout_minutes))
    address = env.master_addr or "127.0.0.1"
    speaks = env.local_rank == 0
    with hold_watchdog(env.rank, node_name(), address, store, train.timeout_minutes, speaks=speaks) as watchdog:
        yield store, watchdog


def report_absence(env: RankEnvironment, error: UserError) -> None:
    """Before this rank leaves with `error`, tell rank 0, which may not have it and would wait.

    Raises:
        OneRankError: in place of `error`, where rank 0 cannot be told: it has failed too, or is not reached.
    """
    if env.is_first or env.local_world_size == env.world_size:  # one host: rank 0 has the same files
        return
    try:
        announce_failure(env, open_store(env, ANNOUNCE_MINUTES), error)
    except UserError:
        if env.local_rank == 0:
            raise OneRankError(f"rank {env.rank} on {node_name()}: {error}") from None
