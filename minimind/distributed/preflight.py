"""Before training: every rank says what it has, rank 0 compares, and a run that could not work stops with one line.

Ranks that never come, hosts with other code or packages, a folder that one host does not see. Speaks through the
key-value store, so that a rank that is missing can be named; there is no process group yet. Knows nothing of engines.
"""

import dataclasses
import datetime
import json
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minimind.distributed.environment import RankEnvironment
from minimind.distributed.host_report import HostReport
from minimind.distributed.store import node_name
from minimind.distributed.watchdog_server import describe_ranks
from minimind.errors import OneRankError, UserError, first_line
from minimind.units import format_bytes, format_table

JOIN_MINUTES = 10.0
"""How long ranks that started early wait for those that have not come."""
NOTICE_SECONDS = 30.0
CLOCK_SECONDS = 60.0
"""Clocks further apart than this stop the run: builds and file systems go by them."""
SIGHT_SECONDS = 15.0
"""How long a new file may take to be seen from another host."""
HEARING_SECONDS = 5.0
"""How long rank 0 stays to let the others hear why the run stops."""
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


@dataclass(frozen=True)
class Sight:
    """What a rank saw when rank 0 said go."""

    sees_run_folder: bool
    clock_offset: float
    """Seconds that its clock is ahead of rank 0's."""


def announce_failure(env: RankEnvironment, store: Any, error: UserError) -> None:
    """Tell rank 0, which waits for this rank's report, why there is none."""
    report = HostReport(env.rank, node_name(), error=str(error))
    store.set(f"preflight/report/{env.rank}", json.dumps(dataclasses.asdict(report)))


def run_preflight(
    env: RankEnvironment,
    store: Any,
    report: HostReport,
    run_dir: Path,
    *,
    needed_bytes: int,
    join_minutes: float,
    say: Callable[[str], None],
) -> None:
    """Compare all ranks' reports; `say` gets rank 0's lines and table. Every rank calls this.

    Args:
        store: torch's key-value store of the run.
        needed_bytes: room that one checkpoint takes in `run_dir`.

    Raises:
        UserError: on every rank, naming the host that differs, is missing or does not see the run folder.
    """
    if store.add(f"preflight/came/{env.rank}", 1) > 1:
        raise OneRankError(
            f"two processes call themselves rank {env.rank}, one of them on {report.host}; start one job"
        )
    store.set(f"preflight/report/{env.rank}", json.dumps(dataclasses.asdict(report)))
    if not env.is_first:
        _follow(env, store, run_dir, join_minutes)
        return
    problem, probe, made = None, None, []
    try:
        reports = _gather_reports(env, store, join_minutes, say)
        problem = find_mismatch(reports, env, needed_bytes)
        say(host_table(reports))
        if problem is None:
            made = _make_folders(run_dir)
            probe = run_dir / f".preflight-{uuid.uuid4().hex}"
            probe.touch()
            store.set("preflight/go", json.dumps({"time": time.time(), "probe": probe.name}))
            sights = [Sight(True, 0.0)] + [
                Sight(**json.loads(_get(store, f"preflight/sight/{rank}", SIGHT_SECONDS * 2)))
                for rank in range(1, env.world_size)
            ]
            problem = find_blindness(reports, sights, run_dir)
    except UserError as error:
        problem = str(error)
    except OSError as error:
        problem = f"run_dir {run_dir}: {error.strerror}; give a folder that can be written"
    finally:
        if probe is not None:
            probe.unlink(missing_ok=True)
    if problem is not None:
        for folder in reversed(made):
            folder.rmdir()
    store.set("preflight/go", json.dumps({"problem": problem}))
    store.set("preflight/verdict", json.dumps(problem))
    if problem is not None:
        # The store ends with this process; the others have to read it first.
        deadline = time.monotonic() + HEARING_SECONDS
        while store.add("preflight/heard", 0) < env.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
        raise UserError(problem)


def find_mismatch(reports: list[HostReport], env: RankEnvironment, needed_bytes: int) -> str | None:
    """The first thing in which hosts differ that must not, as one line."""
    for report in reports:
        if report.error is not None:
            return f"{report.host} (rank {report.rank}): {report.error}"
    for name, wanted in _SAME_EVERYWHERE.items():
        by_value: dict[str, list[HostReport]] = {}
        for report in reports:
            by_value.setdefault(getattr(report, name), []).append(report)
        if len(by_value) > 1:
            parts = [f"{value} on {_hosts(group)}" for value, group in by_value.items()]
            return f"preflight: {name} is {' and '.join(parts)}; use {wanted}"
    hosts = {(report.host, report.boot) for report in reports}
    if env.num_nodes is not None and len(hosts) != env.num_nodes:
        names = ", ".join(sorted({report.host for report in reports}))
        return (
            f"preflight: the launcher started {env.num_nodes} nodes and the ranks are on {len(hosts)} ({names}); check "
            "the host list and the number of tasks a node"
        )
    for report in reports:
        if report.free_bytes < needed_bytes:
            return (
                f"preflight: {report.host} has {format_bytes(report.free_bytes)} free in the run folder's place, and a "
                f"checkpoint takes about {format_bytes(needed_bytes)}; free some, or give another --run-dir"
            )
    return None


def find_blindness(reports: list[HostReport], sights: list[Sight], run_dir: Path) -> str | None:
    """The first host that does not see rank 0's run folder, or whose clock is elsewhere, as one line."""
    for report, sight in zip(reports, sights, strict=True):
        if not sight.sees_run_folder:
            return (
                f"preflight: {report.host} does not see {run_dir} as {reports[0].host} does; put the run folder on a "
                "file system that every host mounts there"
            )
        if abs(sight.clock_offset) > CLOCK_SECONDS:
            ahead = "ahead of" if sight.clock_offset > 0 else "behind"
            return (
                f"preflight: the clock of {report.host} is {abs(sight.clock_offset):.0f} s {ahead} that of "
                f"{reports[0].host}; set the clocks (NTP)"
            )
    return None


def host_table(reports: list[HostReport]) -> str:
    """One line a host (the first of very many)."""
    by_host: dict[tuple[str, str], list[HostReport]] = {}
    for report in reports:
        by_host.setdefault((report.host, report.boot), []).append(report)
    rows = [("host", "ranks", "python", "torch", "deepspeed", "git", "device", "free")]
    for (host, _), group in list(by_host.items())[:LONGEST_TABLE]:
        one = group[0]
        device = f"{len(group)} x {one.device}" if one.device_type == "cuda" else f"cpu, {one.device}"
        ranks = describe_ranks([report.rank for report in group])
        rows.append((host, ranks, one.python, one.torch, one.deepspeed, one.git, device, format_bytes(one.free_bytes)))
    more = f"\nand {len(by_host) - LONGEST_TABLE} more hosts" if len(by_host) > LONGEST_TABLE else ""
    return format_table(rows) + more


def _gather_reports(
    env: RankEnvironment, store: Any, join_minutes: float, say: Callable[[str], None]
) -> list[HostReport]:
    reports: dict[int, HostReport] = {}
    began = noticed = time.monotonic()
    while True:
        for rank in range(env.world_size):
            if rank not in reports and store.check([f"preflight/report/{rank}"]):
                reports[rank] = HostReport(**json.loads(store.get(f"preflight/report/{rank}")))
                if reports[rank].error is not None:
                    return list(reports.values())
        missing = [rank for rank in range(env.world_size) if rank not in reports]
        if not missing:
            return [reports[rank] for rank in range(env.world_size)]
        now = time.monotonic()
        here = f"here: {_hosts(list(reports.values()))}"
        if now - began > join_minutes * 60:
            raise UserError(
                f"rank {describe_ranks(missing)} of {env.world_size} did not come in {join_minutes:g} minutes; {here}; "
                "look at what the launcher said of the other hosts"
            )
        if now - noticed > NOTICE_SECONDS:
            noticed = now
            say(f"waiting for rank {describe_ranks(missing)} since {now - began:.0f} s; {here}")
        time.sleep(0.05 if now - began < 5 else 0.5)


def _follow(env: RankEnvironment, store: Any, run_dir: Path, join_minutes: float) -> None:
    """The other ranks' side: look when rank 0 says go, and take its verdict."""
    go = json.loads(_get(store, "preflight/go", join_minutes * 60 + SIGHT_SECONDS * 2))
    if go.get("problem") is None and "probe" in go:
        offset = time.time() - go["time"]
        deadline = time.monotonic() + SIGHT_SECONDS
        while not (sees := (run_dir / go["probe"]).exists()) and time.monotonic() < deadline:
            time.sleep(0.2)
        store.set(f"preflight/sight/{env.rank}", json.dumps(dataclasses.asdict(Sight(sees, offset))))
    verdict = json.loads(_get(store, "preflight/verdict", SIGHT_SECONDS * 4))
    store.add("preflight/heard", 1)
    if verdict is not None:
        raise UserError(verdict)


def _get(store: Any, key: str, seconds: float) -> bytes:
    try:
        store.wait([key], datetime.timedelta(seconds=seconds))
        return store.get(key)
    except (torch.distributed.DistError, RuntimeError) as error:
        raise UserError(f"preflight: rank 0 or another rank stopped answering ({first_line(error)[:200]})") from None


def _hosts(reports: list[HostReport]) -> str:
    by_host: dict[str, list[int]] = {}
    for report in reports:
        by_host.setdefault(report.host, []).append(report.rank)
    names = [f"{host} (rank {describe_ranks(ranks)})" for host, ranks in by_host.items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more hosts" if len(names) > 8 else "")


def _make_folders(run_dir: Path) -> list[Path]:
    """Make `run_dir`; the folders that were not there, outermost first."""
    missing = [path for path in reversed([run_dir, *run_dir.parents]) if not path.exists()]
    run_dir.mkdir(parents=True, exist_ok=True)
    return missing
