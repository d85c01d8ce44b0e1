"""One rank's report to the preflight: versions, code, device, free space."""

import hashlib
import os
import platform
import shutil
import subprocess
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

from minimind.distributed.environment import RankEnvironment
from minimind.distributed.store import node_name
from minimind.files import ROOT, boot_id


@dataclass(frozen=True)
class HostReport:
    """One rank's report. With an `error`, which kept it from getting this far, the rest is empty."""

    rank: int
    host: str
    boot: str = ""
    """Boot id of the host: two hosts may have one name."""
    python: str = ""
    torch: str = ""
    deepspeed: str = ""
    numpy: str = ""
    code: str = ""
    """Hash of the package's source."""
    git: str = ""
    device_type: str = ""
    device: str = ""
    free_bytes: int = 0
    shards: str = ""
    """Fingerprint of the training shards."""
    sees_run_folder: bool = True
    """Whether a file that rank 0 made in the run folder is there."""
    error: str | None = None


def examine(env: RankEnvironment, device: torch.device, run_dir: Path, shards: str) -> HostReport:
    """This rank's own report."""
    return HostReport(
        rank=env.rank,
        host=node_name(),
        boot=boot_id(),
        python=platform.python_version(),
        torch=torch.__version__,
        deepspeed=version("deepspeed"),
        numpy=version("numpy"),
        code=hash_source(ROOT / "minimind"),
        git=_git_revision(),
        device_type=device.type,
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else f"{os.cpu_count()} cores",
        free_bytes=shutil.disk_usage(_existing(run_dir)).free,
        shards=shards,
    )


def hash_source(folder: Path) -> str:
    """One hash of every Python file below `folder`, by name and content."""
    digest = hashlib.sha256()
    for path in sorted(folder.rglob("*.py")):
        digest.update(path.relative_to(folder).as_posix().encode() + b"\0" + path.read_bytes())
    return digest.hexdigest()[:12]


def _existing(path: Path) -> Path:
    return next(folder for folder in (path.absolute(), *path.absolute().parents) if folder.exists())


def _git_revision() -> str:
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=10"]
        result = subprocess.run(command, capture_output=True, text=True, timeout=20, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return "unknown"
    return result.stdout.strip() if result.returncode == 0 else "unknown"
