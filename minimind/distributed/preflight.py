"""Preflight: before training, rank 0 compares what every rank reports, and a run that cannot work stops with one line.

Runs over the key-value store, before there is a process group, so that a missing rank can be named.
"""

import contextlib
import dataclasses
import datetime
import json
import operator
import time
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch

from minimind.distributed.environment import RankEnvironment
from minimind.distributed.heartbeats import describe_ranks
from minimind.distributed.host_report import HostReport
from minimind.distributed.store import node_name
from minimind.errors import OneRankError, UserError, first_line
from minimind.units import format_bytes, format_table

JOIN_MINUTES = 10.0
"""How long early ranks wait for late ones."""
NOTICE_SECONDS = 30.0
SIGHT_SECONDS = 15.0
"""How long a new file may take to become visible on another host."""
FAREWELL_SECONDS = 5.0
"""How long rank 0, which holds the store, waits for the other ranks to read why the run stops."""
LONGEST_TABLE = 64

_SAME_EVERYWHERE = {
    "python": "the same Python on every host",
    "torch": "the same requirements on every host",
    "deepspeed": "the same requirements on every host",
    "numpy": "the same requirements on every host",
    "code": "the same revision of the repository on every host",
    "device_type": "hosts of one kind",
    "shards": "the same shards on every host",
}


def announce_failure(env: RankEnvironment, store: torch.distributed.Store, error: UserError) -> None:
    """Report to rank 0 that this rank failed before its preflight."""
    report = HostReport(env.rank, node_name(), error=str(error))
    store.set(f"preflight/report/{env.rank}", json.dumps(dataclasses.asdict(report)))


def run_preflight(
    env: RankEnvironment,
    store: torch.distributed.Store,
    report: HostReport,
    run_dir: Path,
    *,
    needed_bytes: int,
    join_minutes: float,
    log: Callable[[str], None],
) -> None:
    """Compare all ranks' reports, and make `run_dir`; `log` gets rank 0's lines and table. Every rank calls this.

    Args:
        needed_bytes: free space that one checkpoint needs in `run_dir`.

    Raises:
        UserError: on every rank, naming the host that differs, is missing or does not see the run folder.
    """
    if store.add(f"preflight/came/{env.rank}", 1) > 1:
        raise OneRankError(
            f"two processes call themselves rank {env.rank}, one of them on {report.host}; start one job"
        )
    if env.is_first:
        _compare(env, store, report, run_dir, needed_bytes, join_minutes, log)
        return
    probe = _get(store, "preflight/probe", join_minutes * 60)
    deadline = time.monotonic() + SIGHT_SECONDS
    while not (sees := not probe or (run_dir / probe).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    report = dataclasses.replace(report, sees_run_folder=sees)
    store.set(f"preflight/report/{env.rank}", json.dumps(dataclasses.asdict(report)))
    problem = _get(store, "preflight/problem", join_minutes * 60 + SIGHT_SECONDS * 2)
    store.add("preflight/heard", 1)
    if problem:
        raise UserError(problem)


def find_mismatch(reports: list[HostReport], env: RankEnvironment, run_dir: Path, needed_bytes: int) -> str | None:
    """The first difference between hosts that would break the run, as one line."""
    for report in reports:
        if report.error is not None:
            return f"{report.host} (rank {report.rank}): {report.error}"
    for name, remedy in _SAME_EVERYWHERE.items():
        by_value = _group(reports, operator.attrgetter(name))
        if len(by_value) > 1:
            parts = [f"{value} on {_hosts(group)}" for value, group in by_value.items()]
            return f"preflight: {name} is {' and '.join(parts)}; use {remedy}"
    hosts = {(report.host, report.boot) for report in reports}
    if env.num_nodes is not None and len(hosts) != env.num_nodes:
        names = ", ".join(sorted({report.host for report in reports}))
        return (
            f"preflight: the launcher started {env.num_nodes} nodes and the ranks are on {len(hosts)} ({names}); check "
            "the host list and the number of tasks per node"
        )
    for report in reports:
        if report.free_bytes < needed_bytes:
            return (
                f"preflight: {report.host} has {format_bytes(report.free_bytes)} free for the run folder, and a "
                f"checkpoint takes about {format_bytes(needed_bytes)}; free some, or give another --run-dir"
            )
        if not report.sees_run_folder:
            return (
                f"preflight: {report.host} does not see {run_dir} as {reports[0].host} does; put the run folder on a "
                "file system that every host mounts there"
            )
    return None


def host_table(reports: list[HostReport]) -> str:
    """One line per host, for the first `LONGEST_TABLE`."""
    by_host = _group(reports, operator.attrgetter("host", "boot"))
    rows = [("host", "ranks", "python", "torch", "deepspeed", "git", "device", "free")]
    for (host, _), group in list(by_host.items())[:LONGEST_TABLE]:
        one = group[0]
        device = f"{len(group)} x {one.device}" if one.device_type == "cuda" else f"cpu, {one.device}"
        ranks = describe_ranks([report.rank for report in group])
        rows.append((host, ranks, one.python, one.torch, one.deepspeed, one.git, device, format_bytes(one.free_bytes)))
    more = f"\nand {len(by_host) - LONGEST_TABLE} more hosts" if len(by_host) > LONGEST_TABLE else ""
    return format_table(rows) + more


def _compare(
    env: RankEnvironment,
    store: torch.distributed.Store,
    report: HostReport,
    run_dir: Path,
    needed_bytes: int,
    join_minutes: float,
    log: Callable[[str], None],
) -> None:
    """Rank 0's side: make the run folder with a file for the others to see, gather the reports, publish the verdict."""
    problem: str | None = "interrupted"
    made, probe = [], run_dir / f".preflight-{uuid.uuid4().hex}"
    try:
        made = [path for path in reversed([run_dir, *run_dir.parents]) if not path.exists()]
        run_dir.mkdir(parents=True, exist_ok=True)
        probe.touch()
        store.set("preflight/probe", probe.name)
        reports = [report, *_gather_reports(env, store, report, join_minutes, log)]
        problem = find_mismatch(reports, env, run_dir, needed_bytes)
        if len(reports) == env.world_size:
            log(host_table(reports))
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"run_dir {run_dir}: {error.strerror}; give a folder that can be written"
    finally:
        with contextlib.suppress(OSError):  # the folder is a file, or was never made
            probe.unlink()
        if problem is not None:
            for folder in reversed(made):
                with contextlib.suppress(OSError):
                    folder.rmdir()
    store.set("preflight/probe", "")
    store.set("preflight/problem", problem or "")
    if problem is not None:
        deadline = time.monotonic() + FAREWELL_SECONDS
        while store.add("preflight/heard", 0) < env.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        raise UserError(problem)


def _gather_reports(
    env: RankEnvironment,
    store: torch.distributed.Store,
    own: HostReport,
    join_minutes: float,
    log: Callable[[str], None],
) -> list[HostReport]:
    """The reports of the other ranks, in order; or those that came before one that reports an error, and that one."""
    reports: dict[int, HostReport] = {}
    missing = list(range(1, env.world_size))
    began = noticed = time.monotonic()
    while True:
        for rank in [rank for rank in missing if store.check([f"preflight/report/{rank}"])]:
            reports[rank] = HostReport(**json.loads(store.get(f"preflight/report/{rank}")))
            missing.remove(rank)
        if not missing or any(report.error for report in reports.values()):
            return [reports[rank] for rank in sorted(reports)]
        now = time.monotonic()
        here = f"here: {_hosts([own, *reports.values()])}"
        if now - began > join_minutes * 60:
            raise UserError(
                f"rank {describe_ranks(missing)} of {env.world_size} did not come in {join_minutes:g} minutes; {here}; "
                "see the launcher's output for the other hosts"
            )
        if now - noticed > NOTICE_SECONDS:
            noticed = now
            log(f"waiting for rank {describe_ranks(missing)} for {now - began:.0f} s; {here}")
        time.sleep(0.05 if now - began < 5 else 0.5)


def _get(store: torch.distributed.Store, key: str, seconds: float) -> str:
    try:
        store.wait([key], datetime.timedelta(seconds=seconds))
        return store.get(key).decode()
    except (torch.distributed.DistError, RuntimeError) as error:
        raise UserError(f"preflight: rank 0 or another rank stopped answering ({first_line(error)[:200]})") from None


def _group(reports: Iterable[HostReport], key: Callable[[HostReport], Any]) -> dict[Any, list[HostReport]]:
    groups: dict[Any, list[HostReport]] = {}
    for report in reports:
        groups.setdefault(key(report), []).append(report)
    return groups


def _hosts(reports: Iterable[HostReport]) -> str:
    by_host = _group(reports, operator.attrgetter("host"))
    names = [f"{host} (rank {describe_ranks([one.rank for one in group])})" for host, group in by_host.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more hosts" if len(names) > 8 else "")
