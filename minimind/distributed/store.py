"""The key-value store that rank 0 opens and the other ranks connect to, and the state of those connections."""

import contextlib
import datetime
import os
import socket
import time
from typing import Any

import psutil
import torch
import torch.distributed

from minimind.errors import OneRankError, first_line


def node_name() -> str:
    """This host's name: the launcher's name for it, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def connect_store(
    rank: int, world_size: int, address: str, port: int, timeout_minutes: float
) -> torch.distributed.Store:
    """Connect to the key-value store that rank 0 opens at `address` and `port`. Every rank calls this.

    Does not wait for ranks that have not connected yet.

    Raises:
        OneRankError: the port is taken, or nothing answers there in time.
    """
    # torchrun's agent has opened one itself, and restarts its ranks on it after a failure.
    is_opened = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if rank != 0:
            _wait_for_port(address, port, timeout_minutes * 60)
        store: torch.distributed.Store = torch.distributed.TCPStore(
            address,
            port,
            world_size,
            is_master=rank == 0 and not is_opened,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            wait_for_workers=False,
        )
    except (OSError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError, ValueError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in str(error):
            reason = "the port is in use on this host; end what holds it, or set another MASTER_PORT"
        raise OneRankError(
            f"rank {rank} on {node_name()}: no process group at MASTER_ADDR {address} MASTER_PORT {port}: {reason}"
        ) from None
    if is_opened:
        store = torch.distributed.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
    return store


def _wait_for_port(address: str, port: int, seconds: float) -> None:
    """Wait until the port is open; torch's own client prints a page of its stack if it isn't in time.

    Raises:
        OSError: it was not, with the last reason.
    """
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=max(1.0, min(10.0, seconds))).close()
            return
        except OSError:
            if time.monotonic() > deadline:
                raise
            time.sleep(0.2)


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
    for connection in _connections(port):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(connection.fd)) as same:  # closed meanwhile
            same.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
            for option, value in (
                ("TCP_KEEPIDLE", max(1, round(seconds / 4))),
                ("TCP_KEEPINTVL", max(1, round(seconds / 8))),
                ("TCP_KEEPCNT", 6),
                ("TCP_USER_TIMEOUT", round(seconds * 1000)),
            ):
                if hasattr(socket, option):  # Linux has all of them
                    same.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def _connections(port: int) -> list[Any]:
    found = psutil.Process().net_connections("tcp")
    return [one for one in found if port in (one.laddr.port, one.raddr.port if one.raddr else None)]
