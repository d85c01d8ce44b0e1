"""The files of a run folder by name, and the reader of metrics.jsonl; needs no torch."""

import json
import os
from pathlib import Path
from typing import Any

from minimind.files import fsync_folder, temporary_name

METRICS_NAME = "metrics.jsonl"
RUN_CONFIG_NAME = "run_config.json"
DS_CONFIG_NAME = "ds_config.json"


def read_records(path: Path) -> list[dict[str, Any]]:
    """The records of a metrics.jsonl that may be written at this moment: a line that is not whole is passed over."""
    return parse_records(path.read_text(encoding="utf-8", errors="replace")) if path.exists() else []


def parse_records(text: str) -> list[dict[str, Any]]:
    """The records in the text of a metrics.jsonl; what is no whole record is passed over."""
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except json.JSONDecodeError:
            continue
        if isinstance(record, dict) and isinstance(record.get("step"), int):
            records.append(record)
    return records


def keep_until(path: Path, step: int) -> None:
    """Drop the lines of a metrics file beyond `step`, and a last line that a crash cut in two."""
    if not path.exists():
        return
    temporary = temporary_name(path)
    with open(path, encoding="utf-8", errors="replace") as old, open(temporary, "w", encoding="utf-8") as new:
        for line in old:
            try:
                record = json.loads(line)
            except json.JSONDecodeError:
                continue
            number = record.get("step") if isinstance(record, dict) else None
            if line.endswith("\n") and isinstance(number, int) and number <= step:
                new.write(line)
        new.flush()
        os.fsync(new.fileno())
    os.replace(temporary, path)
    fsync_folder(path.parent)
