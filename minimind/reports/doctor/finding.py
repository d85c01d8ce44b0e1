"""One thing that the doctor looked at: what it is, how it stands, and what to do. Looks at nothing itself."""

from dataclasses import dataclass
from typing import Literal

Verdict = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Finding:
    """`cure` is what to do; empty where all is well."""

    name: str
    verdict: Verdict
    what: str
    cure: str = ""

    def line(self) -> str:
        """For a terminal."""
        sign = {"ok": "ok  ", "warn": "WARN", "bad": "BAD "}[self.verdict]
        cure = f"; {self.cure}" if self.cure else ""
        return f"  {sign}  {self.name:<18} {self.what}{cure}"
