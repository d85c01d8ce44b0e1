"""The side of rank 0 that hears from every rank: who lives, where each stands, who went first.

A connection that closes without a farewell is a process that died; one that no longer answers on the network is a host
that is down; one that stays open and silent is a process that was stopped. Knows nothing of what the ranks do.
"""

import json
import selectors
import socket
import threading
import time
from dataclasses import dataclass, field
from typing import Any

BEAT_SECONDS = 2.0
SILENCE_SECONDS = 15.0
"""A rank that says nothing for this long is named; it may come back."""
CUT_SECONDS = 40.0
"""A host that acknowledges nothing for this long is given up."""
FAREWELL_SECONDS = 5.0
"""How long the last words to the ranks may take at the end."""

_LONGEST_MESSAGE = 65536


@dataclass
class Peer:
    """One rank, as its connection shows it."""

    connection: socket.socket
    heard: float
    rank: int | None = None
    """None: it has not said who it is."""
    host: str = ""
    pid: int = 0
    step: int | None = None
    phase: str = "starting"
    since: float = 0.0
    """When it came to where it stands, on this process's clock."""
    is_silent: bool = False
    inbox: bytes = b""
    outbox: bytes = b""

    @property
    def name(self) -> str:
        """As people know it."""
        return f"rank {self.rank} on {self.host} (process {self.pid})"


def keep_watch(connection: socket.socket, seconds: float) -> None:
    """Let the kernel break `connection` when the other host acknowledges nothing for `seconds`.

    A process that is merely stopped is no reason: its host acknowledges for it.
    """
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in (
        ("TCP_KEEPIDLE", max(1, round(seconds / 4))),
        ("TCP_KEEPINTVL", max(1, round(seconds / 8))),
        ("TCP_KEEPCNT", 6),
        ("TCP_USER_TIMEOUT", round(seconds * 1000)),
    ):
        if hasattr(socket, option):  # Linux has all of them
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def encode(message: dict[str, Any]) -> bytes:
    """One message as one line."""
    return json.dumps(message).encode() + b"\n"


def describe_ranks(ranks: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def describe_position(step: int | None, phase: str) -> str:
    """Where a rank stands, in words."""
    return phase if step is None else f"step {step}, {phase}"


@dataclass
class WatchdogServer:
    """Listens on a free port from `start` to `close`, in a thread.

    Args:
        token: what a rank must know to be listened to.
        cut_seconds: see `CUT_SECONDS`.
    """

    token: str
    cut_seconds: float = CUT_SECONDS
    port: int = 0
    _peers: list[Peer] = field(default_factory=list)
    _is_lost: bool = False
    _ended: threading.Event = field(default_factory=threading.Event)

    def start(self) -> None:
        """Open the port and begin to listen."""
        self._listener = socket.create_server(("", 0), backlog=1024)
        self._listener.setblocking(False)
        self.port = self._listener.getsockname()[1]
        self._selector = selectors.DefaultSelector()
        self._selector.register(self._listener, selectors.EVENT_READ)
        self._thread = threading.Thread(target=self._serve, name="watchdog-server", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Tell every rank that this is a proper end, and stop."""
        self._ended.set()
        self._thread.join(FAREWELL_SECONDS + 2)

    def _serve(self) -> None:
        beat = time.monotonic()
        while not self._ended.is_set():
            for key, _ in self._selector.select(timeout=0.2):
                if key.fileobj is self._listener:
                    self._accept()
                else:
                    self._receive(key.data)
            now = time.monotonic()
            if now - beat >= BEAT_SECONDS:
                beat = now
                self._broadcast({"beat": True})
                self._look_for_silence(now)
            self._flush()
        self._broadcast({"end": True})
        deadline = time.monotonic() + FAREWELL_SECONDS
        while any(peer.outbox for peer in self._peers) and time.monotonic() < deadline:
            self._flush()
            time.sleep(0.02)
        for peer in self._peers:
            peer.connection.close()
        self._selector.close()
        self._listener.close()

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except OSError:
            return
        connection.setblocking(False)
        keep_watch(connection, self.cut_seconds)
        peer = Peer(connection, heard=time.monotonic(), since=time.monotonic())
        self._peers.append(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _receive(self, peer: Peer) -> None:
        try:
            data = peer.connection.recv(_LONGEST_MESSAGE)
        except BlockingIOError:
            return
        except ConnectionResetError:
            data = b""
        except OSError as error:
            self._drop(peer, f"is lost: its host is down or cut off ({error.strerror})")
            return
        if not data:
            self._drop(peer, "died: its process is gone without a word (killed, or crashed)")
            return
        peer.inbox += data
        *lines, peer.inbox = peer.inbox.split(b"\n")
        for line in lines:
            if peer in self._peers:
                self._understand(peer, line)
        if len(peer.inbox) > _LONGEST_MESSAGE and peer in self._peers:
            self._forget(peer)

    def _understand(self, peer: Peer, line: bytes) -> None:
        try:
            message = json.loads(line)
            if peer.rank is None:
                if message["token"] != self.token:
                    raise ValueError
                peer.rank, peer.host, peer.pid = int(message["rank"]), str(message["host"]), int(message["pid"])
        except (ValueError, KeyError, TypeError):  # none of ours
            self._forget(peer)
            return
        now = time.monotonic()
        peer.heard = now
        if peer.is_silent:
            peer.is_silent = False
            self._broadcast({"say": f"{peer.name} answers again"})
        if "phase" in message:
            peer.step, peer.phase, peer.since = message["step"], message["phase"], now - message["age"]
        if "failed" in message:
            self._report(peer, f"failed: {message['failed']}", message["code"])
        if "where" in message:
            peer.outbox += encode({"where": self._describe_positions()})
        if "bye" in message:
            self._forget(peer)

    def _drop(self, peer: Peer, what: str) -> None:
        """A connection is gone that nobody said farewell on."""
        if peer.rank is not None:
            self._report(peer, what, None)
        self._forget(peer)

    def _forget(self, peer: Peer) -> None:
        self._peers.remove(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _report(self, peer: Peer, what: str, code: int | None) -> None:
        """Tell everybody of the first rank that is lost; what follows from it is no news."""
        if self._is_lost:
            return
        self._is_lost = True
        place = describe_position(peer.step, peer.phase)
        others = self._describe_positions(leave_out=peer)
        line = f"{peer.name} {what}; it stood at {place}" + (f"; the others: {others}" if others else "")
        self._broadcast({"lost": line, "rank": peer.rank, "code": code})

    def _look_for_silence(self, now: float) -> None:
        for peer in self._peers:
            seconds = now - peer.heard
            if peer.rank is not None and not peer.is_silent and seconds > SILENCE_SECONDS:
                peer.is_silent = True
                place = describe_position(peer.step, peer.phase)
                why = "stopped, swapping or cut off"
                self._broadcast({"say": f"{peer.name} has been silent for {seconds:.0f} s: {why}, at {place}"})

    def _describe_positions(self, leave_out: Peer | None = None) -> str:
        """Where the ranks stand, those at the same place together."""
        now = time.monotonic()
        places: dict[str, list[Peer]] = {}
        for peer in self._peers:
            if peer.rank is not None and peer is not leave_out:
                places.setdefault(describe_position(peer.step, peer.phase), []).append(peer)
        parts = []
        for place, peers in sorted(places.items()):
            longest = max(now - peer.since for peer in peers)
            ranks = describe_ranks([peer.rank for peer in peers if peer.rank is not None])
            parts.append(f"rank {ranks} at {place} for {longest:.0f} s")
        parts += [f"{peer.name} silent for {now - peer.heard:.0f} s" for peer in self._peers if peer.is_silent]
        return "; ".join(parts)

    def _broadcast(self, message: dict[str, Any]) -> None:
        line = encode(message)
        for peer in self._peers:
            if peer.rank is not None:
                peer.outbox += line

    def _flush(self) -> None:
        for peer in list(self._peers):
            if not peer.outbox:
                continue
            try:
                sent = peer.connection.send(peer.outbox)
            except BlockingIOError:
                continue
            except (BrokenPipeError, ConnectionResetError):
                continue  # the next read says what became of it
            except OSError as error:
                self._drop(peer, f"is lost: its host is down or cut off ({error.strerror})")
                continue
            peer.outbox = peer.outbox[sent:]
