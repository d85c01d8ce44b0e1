"""Prints what fine-tuning has changed: python launch/quickstart_answers.py BEFORE.jsonl AFTER.jsonl

Of the files of minimind.answer: one exchange of each kind that is shown, and how many held-out answers are right.
"""

import json
import sys
from collections import Counter
from pathlib import Path
from typing import Any

WIDTH = 60


def read_answers(path: str) -> list[dict[str, Any]]:
    """The questions with their answers."""
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


def is_right(record: dict[str, Any]) -> bool:
    """Whether the answer is exactly the expected one."""
    return bool(record["response"]["content"].strip() == record["messages"][-1]["content"])


def show_exchange(before: dict[str, Any], after: dict[str, Any]) -> None:
    """A question, and both answers."""
    print(f"  {before['messages'][0]['content']}")
    for name, record in (("before", before), ("after", after)):
        answer = " ".join(record["response"]["content"].split())
        print(f"    {name:8}{answer if len(answer) <= WIDTH else answer[:WIDTH] + ' ...'}")


def main() -> None:
    before, after = map(read_answers, sys.argv[1:])
    kinds = list(dict.fromkeys(record["kind"] for record in before))
    for kind in (kinds[0], kinds[-1]):
        place = next(place for place, record in enumerate(before) if record["kind"] == kind)
        show_exchange(before[place], after[place])
    print("  held-out questions answered exactly, before and after:")
    right = [Counter(record["kind"] for record in answers if is_right(record)) for answers in (before, after)]
    asked = Counter(record["kind"] for record in before if record["is_held_out"])
    for kind, count in asked.items():
        print(f"    {kind:8}{right[0][kind]} and {right[1][kind]} of {count}")


if __name__ == "__main__":
    main()
