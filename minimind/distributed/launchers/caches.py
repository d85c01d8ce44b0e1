"""Cache folders for compiled code, one for each host of a run: code is compiled for the processor, and file locks do
not work on every network file system. Ranks of one host share: DeepSpeed's builder locks, Triton and inductor rename.
"""

import os
import re
from pathlib import Path

from minimind.distributed.environment import RankEnvironment, node_name
from minimind.errors import OneRankError
from minimind.files import ROOT

_FOLDERS = {
    "TORCH_EXTENSIONS_DIR": "torch_extensions",
    "TRITON_CACHE_DIR": "triton",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
}


def use_own_caches(env: RankEnvironment) -> None:
    """On several hosts, point this process's caches to folders of its host, below those of the environment (or the
    repository's .cache).

    Raises:
        OneRankError: a folder cannot be created.
    """
    if env.local_world_size == env.world_size:
        return
    for name, folder in _FOLDERS.items():
        path = Path(os.environ.get(name) or ROOT / ".cache" / folder) / re.sub(r"[^\w.-]", "_", node_name())
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = f"{error.strerror}; set it to a writable folder"
            raise OneRankError(f"{name} {path} on {node_name()}: {reason}") from None
        os.environ[name] = str(path)
