"""One result of the doctor."""

from dataclasses import dataclass
from typing import Literal

Status = Literal["ok", "warn", "bad"]


@dataclass(frozen=True)
class Check:
    """`fix` says what to do; it is empty where nothing is."""

    name: str
    status: Status
    what: str
    fix: str = ""

    def __str__(self) -> str:
        sign = {"ok": "ok  ", "warn": "WARN", "bad": "BAD "}[self.status]
        return f"  {sign}  {self.name:<18} {'; '.join(filter(None, (self.what, self.fix)))}"
