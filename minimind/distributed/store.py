"""Where the ranks of a run find one another: a key-value store that rank 0 opens and the others connect to.

Knows nothing of launchers, nor of what is said through the store.
"""

import datetime
import os
import socket
import time

import torch
import torch.distributed

from minimind.errors import OneRankError, first_line


def node_name() -> str:
    """What the launcher calls this host, or else its own name."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


def connect_store(
    rank: int, world_size: int, address: str, port: int, timeout_minutes: float
) -> torch.distributed.Store:
    """Connect to the key-value store that rank 0 opens at `address` and `port`. Every rank calls this.

    Nobody waits here for ranks that have not come.

    Raises:
        OneRankError: the port is taken, or nobody answers there in time.
    """
    # torchrun has opened one itself, and starts its ranks again on it after a failure.
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
    """Wait until somebody listens there; torch's own client prints a page of its stack when nobody does in time.

    Raises:
        OSError: nobody did, with the last reason.
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
