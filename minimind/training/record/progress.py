"""The progress of a run on the terminal."""

import sys
import time
from collections.abc import Mapping
from typing import Any

from tqdm import tqdm

from minimind.units import format_duration

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere a line now and then (first, last, and at most one in ten seconds)."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        self._total, self._start = total_steps, start_step
        self._bar = (
            tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, smoothing=0.05)
            if sys.stderr.isatty()
            else None
        )
        self._began = self._last_line = time.monotonic()
        self._first = True

    def show(self, record: Mapping[str, Any]) -> None:
        """Show one step's loss, rate, speed, MFU, and when the run will end."""
        step = record["step"]
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tok/s"
        if record.get("mfu") is not None:
            text += f"  MFU {record['mfu']:.1%}"
        if self._bar is not None:
            self._bar.set_postfix_str(text, refresh=False)
            self._bar.update(step - self._bar.n)
            return
        now = time.monotonic()
        if self._first or step == self._total or now - self._last_line >= SECONDS_BETWEEN_LINES:
            left = (self._total - step) * (now - self._began) / max(1, step - self._start)
            eta = f"  ETA {format_duration(left)}" if not self._first and step < self._total else ""
            print(f"step {step}/{self._total}  {text}{eta}", flush=True)
            self._last_line, self._first = now, False

    def say(self, message: str) -> None:
        """Print a line beside the bar."""
        if self._bar is not None:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def close(self) -> None:
        """Leave the bar as it stands."""
        if self._bar is not None:
            self._bar.close()
