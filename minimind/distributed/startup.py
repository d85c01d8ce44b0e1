"""Startup of a run with several ranks: the store at rank 0's address, the preflight, the watchdog.

Every wait has a limit and names the rank that is missing.
"""

import contextlib
import datetime
from collections.abc import Callable, Iterator
from pathlib import Path

import torch

from minimind.config.resolved_run import ResolvedRun
from minimind.distributed.collectives import log
from minimind.distributed.environment import DEFAULT_MASTER_PORT, RankEnvironment, node_name
from minimind.distributed.preflight import announce_failure, examine, run_preflight
from minimind.distributed.process_group import connect_store
from minimind.distributed.watchdog import Watchdog
from minimind.errors import OneRankError, UserError

JOIN_MINUTES = 10.0
"""How long early ranks wait for late ones."""
ANNOUNCE_MINUTES = 0.25


@contextlib.contextmanager
def join_ranks(
    resolved: ResolvedRun,
    env: RankEnvironment,
    device: torch.device,
    shards: str,
    check_data: Callable[[], None],
    build: Callable[[Callable[[str], None]], None],
    store: torch.distributed.Store | None = None,
) -> Iterator[tuple[torch.distributed.Store | None, Watchdog]]:
    """The store for the process group, and the watchdog, which runs while the block does. Every rank calls this.

    Args:
        shards: fingerprint of the training shards.
        check_data: checks this rank's share of the data.
        build: compiles what the run needs, on one rank of each host while the others wait; it may say what it does.
        store: where this rank is connected already.

    Raises:
        UserError: a rank is missing, a host differs, rank 0 cannot be reached, or `build` has failed somewhere.
    """
    train, run_dir = resolved.train, Path(resolved.train.run_dir)
    watchdog = Watchdog(env.rank, node_name(), train.timeout_minutes, is_logger=env.local_rank == 0)
    if env.world_size == 1:
        build(log)
        yield None, watchdog
        return
    minutes = min(JOIN_MINUTES, train.timeout_minutes)
    store = store or connect_store(env, minutes)
    if train.preflight:
        report = examine(env, device, run_dir, shards)
        try:
            check_data()
        except UserError as error:
            report["error"] = str(error)
        needed = resolved.checkpoint_bytes
        run_preflight(env, store, report, run_dir, needed_bytes=needed, join_minutes=minutes, log=log)
    store.set_timeout(datetime.timedelta(minutes=train.timeout_minutes))
    watchdog.connect(store, env.world_size, env.master_port or DEFAULT_MASTER_PORT)
    with contextlib.closing(watchdog):
        with watchdog.report_failure():
            _build_on_each_host(env, store, watchdog, build)
        yield store, watchdog


def _build_on_each_host(
    env: RankEnvironment,
    store: torch.distributed.Store,
    watchdog: Watchdog,
    build: Callable[[Callable[[str], None]], None],
) -> None:
    """Build on the first rank of each host, however long it takes; a failure is every rank's. The watchdog works
    meanwhile, and there is no process group yet whose collectives could time out."""
    watchdog.report(None, "compiling, or waiting for who compiles", may_last=True)
    if env.local_rank == 0:
        try:
            build(lambda line: print(f"{node_name()}: {line}", flush=True))
        except UserError as error:
            store.set("build/problem", f"{node_name()}: {error}")
    if store.add("build/done", 1) == env.world_size:
        store.set("build/all", "")
    # One question that rank 0 answers at the end: a rank that asks every tenth of a second is one of thousands.
    store.wait(["build/all"], datetime.timedelta(days=30))
    watchdog.report(None, "starting")
    if store.check(["build/problem"]):
        raise UserError(store.get("build/problem").decode())


def report_startup_error(env: RankEnvironment, error: UserError) -> None:
    """Publish this rank's startup error, so that rank 0 fails at once instead of waiting for its report.

    Raises:
        OneRankError: in place of `error`, if rank 0 cannot be told: it has failed too, or cannot be reached.
    """
    if env.is_first or env.local_world_size == env.world_size:  # one host: rank 0 has the same files
        return
    try:
        announce_failure(env, connect_store(env, ANNOUNCE_MINUTES), error)
    except UserError:
        if env.local_rank == 0:
            raise OneRankError(f"rank {env.rank} on {node_name()}: {error}") from None
