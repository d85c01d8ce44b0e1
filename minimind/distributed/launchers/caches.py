"""Where compiled code lies: no host, and no rank, writes what another one reads.

On one host ranks share DeepSpeed's compiled operators (its builder locks them). On several, each host has its own: a
lock does not hold on every network file system, and code is compiled for the processor. Knows nothing of what is
compiled.
"""

import os
import re
from pathlib import Path

from minimind.distributed.environment import RankEnvironment
from minimind.distributed.store import node_name
from minimind.errors import OneRankError
from minimind.files import ROOT

PER_HOST = {"TORCH_EXTENSIONS_DIR": "torch_extensions"}
PER_RANK = {"TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}


def use_own_caches(env: RankEnvironment) -> None:
    """Point this process's caches below where the environment puts them (or .cache of the repository).

    A single rank is left alone; so are the operators of a run on one host.

    Raises:
        OneRankError: a folder cannot be made.
    """
    if env.world_size == 1:
        return
    is_one_host = env.num_nodes == 1 or env.local_world_size == env.world_size
    host = re.sub(r"[^\w.-]", "_", node_name())
    for name, folder in {**PER_HOST, **PER_RANK}.items():
        base = Path(os.environ.get(name) or ROOT / ".cache" / folder)
        if not is_one_host:
            base = base / host
        if name in PER_RANK:
            base = base / f"rank-{env.local_rank}"
        try:
            base.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise OneRankError(
                f"{name} {base} on {node_name()}: {error.strerror}; set it to a folder to write in"
            ) from None
        os.environ[name] = str(base)
