"""A checkpoint that is whole or not there."""

import hashlib
import json
import os
from pathlib import Path


def save(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files and manifest.json, {name: sha256}, under a temporary name beside `folder`; then rename it."""
    raise NotImplementedError


def damaged(folder: Path) -> list[str]:
    """The names of the manifest's files that are missing or have another content."""
    raise NotImplementedError
