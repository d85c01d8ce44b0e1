"""Cache folders for compiled code, so that no host and no rank overwrites what another one reads.

Ranks of one host share DeepSpeed's compiled operators (its builder locks them). On several hosts each has its own: file
locks do not work on every network file system, and code is compiled for the processor.
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
    """Point this process's caches to folders of its own, below those of the environment (or the repository's .cache).

    Nothing changes for a single rank, nor for the operators of a run on one host.

    Raises:
        OneRankError: a folder cannot be created.
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
                f"{name} {base} on {node_name()}: {error.strerror}; set it to a writable folder"
            ) from None
        os.environ[name] = str(base)
