"""This process's rank and device, read from the environment of any launcher (deepspeed, torchrun, SLURM, MPI)."""

import os
import re
import socket
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import deepspeed.accelerator
import deepspeed.comm
import deepspeed.ops
import torch.distributed
from deepspeed.accelerator.cpu_accelerator import CPU_Accelerator

from minimind.accelerator import VISIBLE_DEVICES, accelerator_type, count_devices, takes_one_process, toolkit
from minimind.errors import OneRankError, UserError

# On CPU, DeepSpeed compiles a shared-memory all-reduce at start. It serves inference alone, needs a compiler, and
# leaves 66 MiB a rank in /dev/shm when a process is killed. Declared incompatible, it is neither built nor used.
# It asks for nothing else there; asked for the whole table, DeepSpeed would try every op of its own, compilers and all,
# and on a GPU without the CUDA toolkit print a yellow line for each of seven that no run has asked for.
deepspeed.ops.__compatible_ops__ = {"deepspeed_shm_comm": False}

# DeepSpeed 0.19 calls collectives by names that torch 2.13 has announced to retire; nothing a user could act on.
warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")

DEFAULT_MASTER_PORT = 29500
NVIDIA_DEVICE = Path("/dev/nvidia0")

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")
"""Where torch reads the settings of its allocator; the second is an old name."""


def node_name() -> str:
    """This host's name: the launcher's name for it, or else its own."""
    return os.environ.get("SLURMD_NODENAME") or socket.gethostname()


@dataclass(frozen=True)
class RankEnvironment:
    """One process among all processes of a run, as its launcher describes it."""

    rank: int = 0
    local_rank: int = 0
    world_size: int = 1
    local_world_size: int = 1
    master_addr: str | None = None
    """None: not set (a single process, or MPI before `find_master`)."""
    master_port: int | None = None
    launcher: str = "none"

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, the one that prints and writes."""
        return self.rank == 0

    @property
    def rank_label(self) -> str:
        """The rank and its host, for the messages of one rank; empty for a single rank."""
        return f"rank {self.rank} on {node_name()}" if self.world_size > 1 else ""


# launcher, and its names of rank, world size, local rank, local world size
_LAUNCHERS = (
    ("torch", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"),
    ("openmpi", *(f"OMPI_COMM_WORLD_{name}" for name in ("RANK", "SIZE", "LOCAL_RANK", "LOCAL_SIZE"))),
    ("mpich", "PMI_RANK", "PMI_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
    ("slurm", "SLURM_PROCID", "SLURM_NTASKS", "SLURM_LOCALID", "SLURM_NTASKS_PER_NODE"),
)


def read_environment(environment: Mapping[str, str] | None = None) -> RankEnvironment:
    """This process's rank, from the variables that deepspeed, torchrun, Open MPI, MPICH or SLURM set.

    The deepspeed and torchrun names come first: they are also set inside a SLURM job. MPICH's are ignored if its local
    rank is missing: `srun` with its PMI plugin sets the other two. A SLURM allocation without `srun` (no SLURM_STEP_ID)
    is one process.

    Raises:
        UserError: a variable is missing or not a number, or the rank is not below the world size.
    """
    environment = os.environ if environment is None else environment
    for launcher, rank_name, world_name, local_name, local_world_name in _LAUNCHERS:
        if rank_name not in environment or (world_name not in environment and launcher != "torch"):
            continue
        if launcher == "slurm" and "SLURM_STEP_ID" not in environment:
            continue
        if launcher == "mpich" and local_name not in environment and "SLURM_STEP_ID" in environment:
            continue
        rank, world = _number(environment, rank_name), _number(environment, world_name)
        local_rank = _number(environment, local_name, 0 if world == 1 else None)
        if not 0 <= rank < world:
            raise UserError(f"{rank_name}: {rank} is not below {world_name} {world}; the launcher's variables disagree")
        if launcher == "slurm":
            local_world = _slurm_tasks_here(environment)
        else:
            # The deepspeed launcher calls it LOCAL_SIZE.
            local_world = _number(environment, local_world_name, _number(environment, "LOCAL_SIZE", 0)) or None
        return RankEnvironment(
            rank=rank,
            local_rank=local_rank,
            world_size=world,
            local_world_size=local_world or local_rank + 1,
            master_addr=environment.get("MASTER_ADDR"),
            master_port=_number(environment, "MASTER_PORT", DEFAULT_MASTER_PORT),
            launcher=launcher,
        )
    return RankEnvironment()


def is_first_rank() -> bool:
    """Whether this process prints the run's errors: rank 0, or one whose environment makes no sense."""
    try:
        return read_environment().is_first
    except UserError:
        return True


def _slurm_tasks_here(environment: Mapping[str, str]) -> int | None:
    """Tasks of this step on this node, from a list such as `2(x3),1`: 2 on each of three nodes, 1 on the fourth."""
    text = environment.get("SLURM_STEP_TASKS_PER_NODE") or environment.get("SLURM_TASKS_PER_NODE") or ""
    counts: list[int] = []
    for tasks, nodes in re.findall(r"(\d+)(?:\(x(\d+)\))?", text):
        counts += [int(tasks)] * int(nodes or 1)
    node = _number(environment, "SLURM_NODEID", 0)
    return counts[node] if node < len(counts) else None


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None:
        raise UserError(f"{name}: not set, but its companions are; start with deepspeed, torchrun, srun or mpirun")
    if not text.isdecimal():
        raise UserError(f"{name}: {text!r} is no number; start the run with deepspeed, torchrun, srun or mpirun")
    return int(text)


def expand_segments() -> None:
    """Let the allocator of an NVIDIA GPU grow the segments that it has: experts get other numbers of rows in every
    step, and memory in pieces of fixed size breaks up. Before the first tensor on the device; the user's own settings
    take precedence.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def find_device(env: RankEnvironment, wanted: str = "auto") -> torch.device:
    """The device of this rank: its accelerator where there are any, otherwise the CPU, unless one of them is `wanted`.

    Raises:
        OneRankError: fewer devices than local ranks, or none that torch can use where they are wanted or there.
    """
    found = accelerator_type()
    if wanted == "cpu":
        return _take_cpu()
    if found is None or wanted not in ("auto", found):
        is_hidden = os.environ.get("CUDA_VISIBLE_DEVICES") == "" or os.environ.get("DS_ACCELERATOR") == "cpu"
        if wanted != "auto" or (NVIDIA_DEVICE.exists() and not is_hidden):
            raise OneRankError(
                f"{node_name()}: {NVIDIA_DEVICE if wanted == 'auto' else f'--device {wanted}'}: torch "
                f"{torch.__version__}, made for {toolkit()}, finds {found or 'no GPU'}: update the driver, install "
                f"torch for this device, or pass --device {found or 'cpu'}"
            )
        return torch.device("cpu")
    count = count_devices()
    if takes_one_process(found) and env.world_size > 1:
        if wanted == "auto":
            return _take_cpu()
        raise OneRankError(f"--device {found}: one process computes on it, not {env.world_size}; pass --device cpu")
    # A launcher that shows each rank one device only (srun --gpus-per-task=1, or CUDA_VISIBLE_DEVICES=$SLURM_LOCALID)
    # makes that device number 0.
    index = env.local_rank if count > 1 else 0
    visible = next((os.environ[name] for name in VISIBLE_DEVICES.get(found, ()) if name in os.environ), "")
    is_own = "SLURM_STEP_GPUS" in os.environ or visible == str(env.local_rank) or visible.startswith(("GPU-", "MIG-"))
    if env.local_rank >= count > 1 or (count == 1 and env.local_world_size > 1 and not is_own):
        raise OneRankError(
            f"local rank {env.local_rank} of {env.local_world_size}: this host has {count} {found} devices "
            f"({node_name()})"
        )
    return torch.device(found, index)


def _take_cpu() -> torch.device:
    """The CPU, for DeepSpeed too, which takes the accelerator that it finds."""
    if deepspeed.accelerator.get_accelerator().device_name() != "cpu":
        deepspeed.accelerator.set_accelerator(CPU_Accelerator())
    return torch.device("cpu")
