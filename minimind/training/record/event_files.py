"""TensorBoard's files of one run in the order in which they were written.

TensorBoard orders them by the time in their names: after a clock was set back, the file of a continued run would come
first, and its start would purge the steps of the older ones.
"""

import os
import re
from pathlib import Path

_NAME = re.compile(r"events\.out\.tfevents\.(\d{10})\.(.+)")


def put_in_the_past(folder: Path, now: float) -> None:
    """Rename the event files in `folder` that a file made `now` would not come after; their order stays."""
    found = sorted(path for path in folder.glob("events.out.tfevents.*") if _NAME.fullmatch(path.name))
    latest = int(now) - 1
    for path in reversed(found):
        match = _NAME.fullmatch(path.name)
        assert match is not None
        if int(match[1]) > latest:
            os.replace(path, path.with_name(f"events.out.tfevents.{latest:010d}.{match[2]}"))
        latest = min(latest, int(match[1])) - 1
