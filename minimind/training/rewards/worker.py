"""The process in which rewards are computed: answers as lines of JSON in, their rewards as lines of JSON out.

python -m minimind.training.rewards.worker MODULE:FUNCTION...
"""

import importlib
import json
import os
import queue
import sys
import threading
from collections.abc import Callable
from typing import Any

from minimind.training.rewards.ready import Answer


def main(names: list[str]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reward prints must not stand among the replies
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()
    functions = []

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    for name in names:
        try:
            functions.append(find_function(name))
        except BaseException as error:
            return reply(error=f"{name} cannot be imported: {describe(error)}")
    reply(values=[])
    while True:
        answer, values = Answer(**json.loads(lines.get())), []
        try:
            for function in functions:
                values.append(float(function(answer)))
            reply(values=values)
        except Exception as error:
            reply(error=f"{names[len(values)]} raised {describe(error)}")


def read_lines(lines: queue.Queue[str]) -> None:
    """Hand lines on; at the end of the input the training is gone, and a reward that hangs must not stay."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def find_function(name: str) -> Callable[[Answer], float]:
    """The function `module:function`, or the ready one of that name."""
    module, _, function = name.rpartition(":")
    return getattr(importlib.import_module(module or "minimind.training.rewards.ready"), function)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
