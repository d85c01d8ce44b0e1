"""A checkpoint that is whole or not there."""

import hashlib
import json
import os
from pathlib import Path


def save(folder: Path, files: dict[str, bytes]) -> None:
    """Write the files and manifest.json, {name: sha256}, under a temporary name beside `folder`; then rename it."""
    temporary = folder.with_name(folder.name + ".tmp")
    temporary.mkdir(parents=True)
    for name, content in files.items():
        (temporary / name).write_bytes(content)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
    (temporary / "manifest.json").write_text(json.dumps(hashes))
    os.replace(temporary, folder)


def damaged(folder: Path) -> list[str]:
    """The names of the manifest's files that are missing or have another content."""
    hashes = json.loads((folder / "manifest.json").read_text())

    def is_whole(name: str) -> bool:
        path = folder / name
        return path.exists() and hashlib.sha256(path.read_bytes()).hexdigest() == hashes[name]

    return [name for name in hashes if not is_whole(name)]
