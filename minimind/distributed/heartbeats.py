"""Rank 0's view of all ranks, from their beats in the store: who is gone, who is silent, where each one is."""

import contextlib
import json
import os
import socket
import time
from dataclasses import dataclass
from typing import Any

import psutil

LATE_SECONDS = 2.5
"""A rank without a beat for this long is looked at: if its connections are closed, it is dead."""
SILENCE_SECONDS = 15.0
"""A rank that is connected and without a beat for this long is named, not ended: a suspended or swapping process comes
back, and so does one whose compiler or writer holds Python's lock."""
CUT_SECONDS = 40.0
"""The kernel closes the connection to a host that acknowledges nothing for this long: longer than a switch takes to
restart a port, shorter than the minute after which SLURM ends the job step."""

MOST_NAMED = 16
"""Every rank reads the summary: its length must not grow with the number of ranks."""


@dataclass(frozen=True)
class Loss:
    """The first rank that was lost; `code` is its exit code, None if it could not give one."""

    rank: int
    reason: str
    code: int | None = None


class RankBeats:
    """Rank 0's view of all ranks, from their beats."""

    def __init__(self, world_size: int, port: int) -> None:
        self.keys = [f"beat/{rank}" for rank in range(world_size)]
        self.all_ended = False
        self._port = port
        self._raw = [b""] * world_size
        self._heard = [0.0] * world_size
        self._was_connected: set[int] = set()
        self._gone: set[int] = set()
        self._count = 0
        self._last = time.monotonic()

    def look(self, store: Any) -> tuple[Loss | None, dict[str, Any]]:
        """Read every beat: a rank that is gone, and the summary for all."""
        raw, now = store.multi_get(self.keys), time.monotonic()
        pause = now - self._last if now - self._last > LATE_SECONDS else 0.0  # of this process: no rank's silence
        self._last, self._count = now, self._count + 1
        joined = {rank for rank, old in enumerate(self._raw) if raw[rank] and not old}
        self._heard = [
            now if new != old else heard + pause for new, old, heard in zip(raw, self._raw, self._heard, strict=True)
        ]
        self._raw = raw
        beats = {rank: json.loads(text or '{"ended": false}') for rank, text in enumerate(raw)}
        self.all_ended = all(beats[rank]["ended"] for rank in range(1, len(raw)) if rank not in self._gone)
        beats = {rank: beat for rank, beat in beats.items() if raw[rank] and not beat["ended"]}
        silence = {rank: now - self._heard[rank] for rank in beats}
        late = {rank for rank in beats if silence[rank] > LATE_SECONDS}
        there = set(open_connections(self._port, of_server=True)) if joined | late else set()
        connected = {rank for rank in (joined | late) & beats.keys() if there.intersection(beats[rank]["addresses"])}
        self._was_connected |= connected
        # A rank whose connection cannot be recognised here (a network that translates addresses) is only called silent.
        gone = sorted((late & self._was_connected) - connected - self._gone)
        self._gone.update(gone)
        silent = {
            beats[rank]["name"]: describe_silence(beats[rank]["name"], silence[rank], _position(beats[rank]))
            for rank in [rank for rank in sorted(late - self._gone) if silence[rank] > SILENCE_SECONDS][:MOST_NAMED]
        }
        summary = {"count": self._count, "silent": silent, "where": _describe_positions(beats)}
        if not gone:
            return None, summary
        what = "died: its process is gone (killed or crashed)"
        if silence[gone[0]] > CUT_SECONDS / 2:
            what = "is lost: its process is gone, or its host is down or cut off"
        beat = beats[gone[0]]
        return Loss(gone[0], f"{beat['name']} {what}; it was at {_position(beat)}"), summary


def describe_ranks(ranks: list[int], most: int | None = None) -> str:
    """[0, 1, 2, 5] as "0-2, 5"; with the first `most` runs only."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    text = ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs[:most])
    return text if len(runs) <= (most or len(runs)) else f"{text} and more, {len(ranks)} in all,"


def describe_position(step: int | None, phase: str) -> str:
    """Where a rank is, in words."""
    return phase if step is None else f"step {step}, {phase}"


def _position(beat: dict[str, Any]) -> str:
    return describe_position(beat["step"], beat["phase"])


def describe_silence(name: str, seconds: float, position: str = "") -> str:
    """The line about a rank without beats."""
    where = f", at {position}" if position else ""
    return f"{name} has been silent for {seconds:.0f} s: stopped, swapping or cut off{where}"


def _describe_positions(beats: dict[int, Any]) -> str:
    """Where the ranks are, those at the same place together."""
    places: dict[str, list[int]] = {}
    for rank, beat in beats.items():
        places.setdefault(_position(beat), []).append(rank)
    return "; ".join(
        f"rank {describe_ranks(ranks, MOST_NAMED)} at {place} for {max(beats[rank]['seconds'] for rank in ranks)} s"
        for place, ranks in sorted(places.items())
    )


def open_connections(port: int, *, of_server: bool = False) -> list[str]:
    """Addresses ("IP PORT") of the clients that this process has connected to a store's `port`, or, `of_server`, of all
    clients that are connected to the store which it serves at `port`."""
    found = []
    for connection in _connections(port):
        end, other = connection.laddr, connection.raddr
        client, server = (other, end) if of_server else (end, other)
        if connection.status == psutil.CONN_ESTABLISHED and server.port == port:
            found.append(f"{client.ip.removeprefix('::ffff:')} {client.port}")
    return found


def drop_dead_connections(port: int, seconds: float) -> None:
    """Let the kernel close this process's connections to or of the store at `port` when the other host acknowledges
    nothing for `seconds`. torch sets no such limit. A process that is merely stopped keeps its connections: its kernel
    acknowledges for it. What connects to this process later inherits the limit from the listening socket."""
    if not hasattr(socket, "TCP_USER_TIMEOUT"):  # not Linux
        return
    for connection in _connections(port):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as same:  # closed meanwhile
            same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, max(1, round(seconds / 4)))
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, max(1, round(seconds / 8)))
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 6)
            same.setsockopt(socket.IPPROTO_TCP, socket.TCP_USER_TIMEOUT, round(seconds * 1000))


def _connections(port: int) -> list[Any]:
    found = psutil.Process().net_connections("tcp")
    return [one for one in found if port in (one.laddr.port, one.raddr.port if one.raddr else None)]
