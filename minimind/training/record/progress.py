"""The progress of a run on the terminal."""

import sys
import time

from tqdm import tqdm

from minimind.training.record.run_files import StepRecord
from minimind.units import format_duration

SECONDS_BETWEEN_LINES = 10.0


class Progress:
    """A bar on a terminal; elsewhere a line now and then (first, last, and at most one in ten seconds)."""

    def __init__(self, start_step: int, total_steps: int) -> None:
        self._total, self._start = total_steps, start_step
        self._bar = None
        if sys.stderr.isatty():
            self._bar = tqdm(total=total_steps, initial=start_step, unit="step", dynamic_ncols=True, smoothing=0.05)
        self._began = self._last_line = time.monotonic()
        self._first = True

    def show(self, record: StepRecord) -> None:
        """Show a step's loss, learning rate, speed and MFU, and the time left."""
        step = record["step"]
        text = f"loss {record['loss']:.4f}  lr {record['lr']:.2e}  {record['tokens_per_second']:,.0f} tok/s"
        if (mfu := record.get("mfu")) is not None:
            text += f"  MFU {mfu:.1%}"
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

    def log(self, message: str) -> None:
        """Print a line without tearing the bar."""
        if self._bar is not None:
            self._bar.write(message)
        else:
            print(message, flush=True)

    def close(self) -> None:
        """Leave the bar as it is."""
        if self._bar is not None:
            self._bar.close()
