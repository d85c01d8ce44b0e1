"""The store that rank 0 opens, the process group of a run over it, and each CPU rank's share of its host's cores."""

import contextlib
import datetime
import os
import socket
import sys
import time
from collections.abc import Iterator

import deepspeed.comm
import deepspeed.ops
import deepspeed.utils.groups
import torch.distributed

from minimind.accelerator import collectives_of
from minimind.distributed.cpu_gather import gather_in_place
from minimind.distributed.environment import DEFAULT_MASTER_PORT, RankEnvironment, node_name
from minimind.errors import OneRankError, first_line
from minimind.host import count_cores

NCCL_SECONDS = 60.0
"""On CUDA a collective fails so much later than the watchdog, which says where every rank is: NCCL would only abort."""


def connect_store(env: RankEnvironment, timeout_minutes: float) -> torch.distributed.Store:
    """Connect to the key-value store that rank 0 opens at MASTER_ADDR and MASTER_PORT. Every rank calls this.

    Does not wait for ranks that have not connected yet.

    Raises:
        OneRankError: the port is taken, or nothing answers there in time.
    """
    if env.master_addr is None and env.local_world_size < env.world_size:
        raise OneRankError("MASTER_ADDR: not set; set it to rank 0's host")
    address, port = env.master_addr or "127.0.0.1", env.master_port or DEFAULT_MASTER_PORT
    # torchrun's agent has opened one itself, and restarts its ranks on it after a failure.
    is_opened = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    try:
        if not env.is_first:
            _wait_for_port(address, port, timeout_minutes * 60)
        store: torch.distributed.Store = torch.distributed.TCPStore(
            address,
            port,
            env.world_size,
            is_master=env.is_first and not is_opened,
            timeout=datetime.timedelta(minutes=timeout_minutes),
            wait_for_workers=False,
        )
    except (OSError, torch.distributed.DistNetworkError, torch.distributed.DistStoreError, ValueError) as error:
        reason = first_line(error)
        if "EADDRINUSE" in str(error):
            reason = "the port is in use on this host; end what holds it, or set another MASTER_PORT"
        raise OneRankError(
            f"rank {env.rank} on {node_name()}: no process group at MASTER_ADDR {address} MASTER_PORT {port}: {reason}"
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


@contextlib.contextmanager
def process_group(
    env: RankEnvironment,
    device: torch.device,
    timeout_minutes: float = 30.0,
    store: torch.distributed.Store | None = None,
) -> Iterator[None]:
    """Join the process group of the run, and leave it whatever happens. Every rank calls this.

    A single process needs no port and no address. Tensors of an accelerator go through its own library (NCCL,
    XCCL, HCCL), those of the host through gloo.

    Args:
        store: the run's store, if the ranks are connected already; otherwise they connect now.

    Raises:
        UserError: the master cannot be reached, or its port is taken.
    """
    collectives = collectives_of(device)
    backend = "gloo" if collectives == "gloo" else f"cpu:gloo,{device.type}:{collectives}"
    if device.type != "cpu":
        torch.accelerator.set_device_index(device)
    share_cores(env)
    if store is None:
        is_alone = env.world_size == 1 and env.master_addr is None
        store = torch.distributed.HashStore() if is_alone else connect_store(env, timeout_minutes)
    later = 0.0 if backend == "gloo" else NCCL_SECONDS
    with _told_by_environment(env, device):
        try:
            torch.distributed.init_process_group(
                backend,
                store=torch.distributed.PrefixStore("group", store),
                rank=env.rank,
                world_size=env.world_size,
                timeout=datetime.timedelta(minutes=timeout_minutes, seconds=later),
                # NCCL connects now, where a failure is one line, and later groups are cut out of this one. DeepSpeed
                # leaves it out on a single rank, which has nobody to connect to.
                device_id=device if backend != "gloo" and env.world_size > 1 else None,
            )
        except (torch.distributed.DistNetworkError, torch.distributed.DistStoreError) as error:
            reason = first_line(error)
            raise OneRankError(f"rank {env.rank} on {node_name()}: no process group: {reason}") from None
        try:
            deepspeed.init_distributed(dist_backend=backend, auto_mpi_discovery=False, verbose=False)
            # DeepSpeed would clone the world for get_global_rank, which torch 2.13 answers for the world itself: a
            # second set of connections, on CUDA a second NCCL communicator.
            deepspeed.utils.groups._WORLD_GROUP = torch.distributed.group.WORLD
            if backend == "gloo":
                deepspeed.comm.comm.cdb.all_gather_function = gather_in_place
            yield
        finally:
            # DeepSpeed's own call also forgets the groups that it keeps in globals: a second run in this process needs
            # new ones.
            deepspeed.comm.destroy_process_group()
            deepspeed.comm.comm.cdb = None


@contextlib.contextmanager
def _told_by_environment(env: RankEnvironment, device: torch.device) -> Iterator[None]:
    """Set the variables from which DeepSpeed and torch read the rank, whatever the launcher calls them; restored
    afterwards, so that nothing later in this process takes itself for a rank."""
    # DeepSpeed takes the local rank for the number of the device, which is 0 where a task sees only its own.
    local_rank = str(env.local_rank if device.index is None else device.index)
    told = {"RANK": str(env.rank), "WORLD_SIZE": str(env.world_size), "LOCAL_RANK": local_rank}
    # gloo connects two ranks when they first speak to each other, instead of everybody with everybody at the start: a
    # rank needs some 20 descriptors at any world size, and the store no list of all addresses for each rank.
    told |= {"TORCH_GLOO_LAZY_INIT": os.environ.get("TORCH_GLOO_LAZY_INIT", "1")}
    if sys.platform == "darwin":  # its gloo refuses that, and asks the network for the name of a machine it is alone on
        told["TORCH_GLOO_LAZY_INIT"] = "0"
        if env.local_world_size == env.world_size:
            told["GLOO_SOCKET_IFNAME"] = os.environ.get("GLOO_SOCKET_IFNAME", "lo0")
    if "OMPI_COMM_WORLD_LOCAL_RANK" in os.environ:  # DeepSpeed wants both alike
        told["OMPI_COMM_WORLD_LOCAL_RANK"] = local_rank
    before = {name: os.environ.get(name) for name in told}
    os.environ.update(told)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


def share_cores(env: RankEnvironment) -> None:
    """Give each local rank its share of the cores (on CUDA for CPU Adam), unless OMP_NUM_THREADS says otherwise."""
    if "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(count_threads(env))


def count_threads(env: RankEnvironment) -> int:
    """Threads of a local rank: what OMP_NUM_THREADS says, or its share of the cores."""
    if "OMP_NUM_THREADS" in os.environ:
        return torch.get_num_threads()
    return max(1, count_cores() // max(1, env.local_world_size))
