"""Preflight: before training, rank 0 compares what every rank reports, and a run that cannot work stops with one line.

Runs over the key-value store, before there is a process group, so that a missing rank can be named.
"""

import contextlib
import datetime
import hashlib
import json
import platform
import shutil
import time
import uuid
from collections.abc import Callable, Iterable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

from minimind.accelerator import device_name
from minimind.distributed.environment import RankEnvironment, node_name
from minimind.distributed.heartbeats import describe_ranks
from minimind.errors import OneRankError, UserError, first_line
from minimind.files import ROOT, raise_open_files
from minimind.units import format_bytes, format_table

NOTICE_SECONDS = 30.0
ROUND_SECONDS = 2.0
"""How long rank 0 waits without looking at its clock; Ctrl-C waits as long."""
SIGHT_SECONDS = 15.0
"""How long a new file may take to become visible on another host."""
FAREWELL_SECONDS = 5.0
"""How long rank 0, which holds the store, waits for the other ranks to read why the run stops."""
LONGEST_TABLE = 64

# What has to be equal, and of what the same has to be used.
_SAME_EVERYWHERE = {"python": "Python", "torch": "requirements", "deepspeed": "requirements", "numpy": "requirements"}
_SAME_EVERYWHERE |= {"code": "revision of the repository", "device_type": "kind of host", "shards": "shards"}

Report = dict[str, Any]
"""What a rank says of itself (`examine`); of one that failed before that: its `rank`, `host` and `error`."""

CONNECTIONS_A_RANK = 2
"""To the store, which rank 0 serves: a rank's own, and its watchdog's."""
OTHER_FILES = 256


def examine(env: RankEnvironment, device: torch.device, run_dir: Path, shards: str) -> Report:
    """This rank's own report; `shards` is the fingerprint of the training shards. What is the host's own, the first
    rank of each host finds out: eight need not read the same source."""
    report = {
        "rank": env.rank,
        "host": node_name(),
        "device_type": device.type,
        "device": device_name(device),
    }
    if env.local_rank:
        return report
    return report | {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "deepspeed": version("deepspeed"),
        "numpy": version("numpy"),
        "code": hash_source(ROOT / "minimind"),
        "free_bytes": shutil.disk_usage(_folders(run_dir)[_first_existing(run_dir)]).free,
        "shards": shards,
        "sees_run_folder": True,
    }


def hash_source(folder: Path) -> str:
    """One hash of every Python file below `folder`, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def announce_failure(env: RankEnvironment, store: torch.distributed.Store, error: UserError) -> None:
    """Report to rank 0 that this rank failed before its preflight."""
    _send(env, store, {"rank": env.rank, "host": node_name(), "error": str(error)})


def run_preflight(
    env: RankEnvironment,
    store: torch.distributed.Store,
    report: Report,
    run_dir: Path,
    *,
    needed_bytes: int,
    join_minutes: float,
    log: Callable[[str], None],
) -> None:
    """Compare all ranks' reports; `log` gets rank 0's lines and table. Every rank calls this.

    Args:
        needed_bytes: free space that one checkpoint needs in `run_dir`.

    Raises:
        UserError: on every rank, naming the host that differs, is missing or does not see the run folder.
    """
    if store.add(f"preflight/came/{env.rank}", 1) > 1:
        raise OneRankError(
            f"two processes call themselves rank {env.rank}, one of them on {report['host']}; start one job"
        )
    if env.is_first:
        problem = _compare(env, store, report, run_dir, needed_bytes, join_minutes, log) or ""
        store.set("preflight/probe", "")
        store.set("preflight/problem", problem)
        deadline = time.monotonic() + FAREWELL_SECONDS
        while problem and store.add("preflight/heard", 0) < env.world_size - 1 and time.monotonic() < deadline:
            time.sleep(0.05)
    else:
        probe = _get(store, "preflight/probe", join_minutes * 60)
        if probe and "sees_run_folder" in report:
            report["sees_run_folder"] = _sees(run_dir, *json.loads(probe))
        _send(env, store, report)
        problem = _get(store, "preflight/problem", join_minutes * 60 + SIGHT_SECONDS * 2)
        store.add("preflight/heard", 1)
    if problem:
        raise UserError(problem)


def find_mismatch(reports: list[Report], run_dir: Path, needed_bytes: int) -> str | None:
    """The first difference between hosts that would break the run, as one line."""
    for report in reports:
        if "error" in report:
            return f"{report['host']} (rank {report['rank']}): {report['error']}"
    for name, remedy in _SAME_EVERYWHERE.items():
        by_value = _group([report for report in reports if name in report], name)
        if len(by_value) > 1:
            parts = [f"{value} on {_hosts(group)}" for value, group in by_value.items()]
            return f"preflight: {name} is {' and '.join(parts)}; use the same {remedy} on every host"
    for report in [report for report in reports if "free_bytes" in report]:
        if report["free_bytes"] < needed_bytes:
            return (
                f"preflight: {report['host']} has {format_bytes(report['free_bytes'])} free for the run folder, and a "
                f"checkpoint takes about {format_bytes(needed_bytes)}; free some, or give another --run-dir"
            )
        if not report["sees_run_folder"]:
            return (
                f"preflight: {report['host']} does not see {run_dir} as {reports[0]['host']} does; put the run folder "
                "on a file system that every host mounts there"
            )
    return None


def host_table(reports: list[Report]) -> str:
    """One line per host, for the first `LONGEST_TABLE`."""
    by_host = _group(reports, "host")
    rows = [("host", "ranks", "python", "torch", "deepspeed", "code", "device", "free")]
    for host, group in list(by_host.items())[:LONGEST_TABLE]:
        one = next((report for report in group if "code" in report), group[0])
        versions = (one["python"], one["torch"], one["deepspeed"], one["code"])
        device = f"{len(group)} x {one['device']}" if one["device_type"] != "cpu" else f"cpu, {one['device']}"
        rows.append((host, _ranks(group), *versions, device, format_bytes(one["free_bytes"])))
    more = f"\nand {len(by_host) - LONGEST_TABLE} more hosts" if len(by_host) > LONGEST_TABLE else ""
    return format_table(rows) + more


def _compare(
    env: RankEnvironment,
    store: torch.distributed.Store,
    report: Report,
    run_dir: Path,
    needed_bytes: int,
    join_minutes: float,
    log: Callable[[str], None],
) -> str | None:
    """Rank 0's side: make a file for the others to see where the run folder is or will be, and gather the reports."""
    needed_files, limit = CONNECTIONS_A_RANK * env.world_size + OTHER_FILES, raise_open_files()
    if limit < needed_files:
        return (
            f"preflight: {report['host']} lets a process open {limit} files, and rank 0 of {env.world_size} ranks "
            f"needs {needed_files}; raise its hard limit (ulimit -Hn)"
        )
    if "error" in report:
        return find_mismatch([report], run_dir, needed_bytes)
    depth = _first_existing(run_dir)
    probe = _folders(run_dir)[depth] / f".preflight-{uuid.uuid4().hex}"
    try:
        probe.touch()
        store.set("preflight/probe", json.dumps([depth, probe.name]))
        reports = [report, *_gather_reports(env, store, report, join_minutes, log)]
        if len(reports) == env.world_size:
            log(host_table(reports))
        return find_mismatch(reports, run_dir, needed_bytes)
    except UserError as error:
        return str(error)
    except OSError as error:
        return f"run_dir {run_dir}: {error.strerror}; give a folder that can be written"
    finally:
        with contextlib.suppress(OSError):  # the folder is a file, or cannot be written
            probe.unlink()


def _gather_reports(
    env: RankEnvironment,
    store: torch.distributed.Store,
    own: Report,
    join_minutes: float,
    log: Callable[[str], None],
) -> list[Report]:
    """The reports of the other ranks, in order; or those that came before one that reports an error, and that one."""
    others = range(1, env.world_size)
    began = noticed = time.monotonic()
    while True:
        # One question a round, however many ranks there are; only a line about those that are missing asks for each.
        with contextlib.suppress(torch.distributed.DistStoreError):
            store.wait(["preflight/gathered"], datetime.timedelta(seconds=ROUND_SECONDS))
            is_failed = store.check(["preflight/failed"])
            return _read_reports(store, [int(store.get("preflight/failed"))] if is_failed else others)
        now = time.monotonic()
        is_late, is_due = now - began > join_minutes * 60, now - noticed > NOTICE_SECONDS
        if is_late or is_due:
            noticed = now
            came = [rank for rank in others if store.check([f"preflight/report/{rank}"])]
            missing = describe_ranks(sorted(set(others) - set(came)))
            here = f"here: {_hosts([own, *_read_reports(store, came)])}"
            if is_late:
                raise UserError(
                    f"rank {missing} of {env.world_size} did not come in {join_minutes:g} minutes; {here}; see the "
                    "launcher's output for the other hosts"
                )
            log(f"waiting for rank {missing} for {now - began:.0f} s; {here}")


def _read_reports(store: torch.distributed.Store, ranks: Iterable[int]) -> list[Report]:
    return [json.loads(text) for text in store.multi_get([f"preflight/report/{rank}" for rank in ranks])]


def _folders(run_dir: Path) -> list[Path]:
    return [run_dir.absolute(), *run_dir.absolute().parents]


def _first_existing(run_dir: Path) -> int:
    return next(depth for depth, folder in enumerate(_folders(run_dir)) if folder.exists())


def _sees(run_dir: Path, depth: int, name: str) -> bool:
    """Whether this host has, or soon gets, rank 0's file `name` that many folders above the run folder."""
    deadline = time.monotonic() + SIGHT_SECONDS
    while not (seen := (_folders(run_dir)[depth] / name).exists()) and time.monotonic() < deadline:
        time.sleep(0.2)
    return seen


def _send(env: RankEnvironment, store: torch.distributed.Store, report: Report) -> None:
    """Leave the report for rank 0, which the last one wakes, and the first that tells an error."""
    store.set(f"preflight/report/{env.rank}", json.dumps(report))
    if "error" in report:
        store.compare_set("preflight/failed", "", str(env.rank))
    if store.add("preflight/reports", 1) == env.world_size - 1 or "error" in report:
        store.set("preflight/gathered", "")


def _get(store: torch.distributed.Store, key: str, seconds: float) -> str:
    try:
        store.wait([key], datetime.timedelta(seconds=seconds))
        return store.get(key).decode()
    except (torch.distributed.DistError, RuntimeError) as error:
        raise UserError(f"preflight: rank 0 or another rank stopped answering ({first_line(error)[:200]})") from None


def _group(reports: Iterable[Report], name: str) -> dict[str, list[Report]]:
    groups: dict[str, list[Report]] = {}
    for report in reports:
        groups.setdefault(report[name], []).append(report)
    return groups


def _ranks(reports: Iterable[Report]) -> str:
    return describe_ranks([report["rank"] for report in reports])


def _hosts(reports: Iterable[Report]) -> str:
    names = [f"{host} (rank {_ranks(group)})" for host, group in _group(reports, "host").items()]
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more hosts" if len(names) > 8 else "")
