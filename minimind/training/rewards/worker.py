"""The process in which rewards are computed: answers as lines of JSON in, their rewards as lines of JSON out.

python -m minimind.training.rewards.worker MODULE:FUNCTION...
"""

import importlib
import json
import os
import queue
import sys
import threading
from typing import Any

from minimind.training.rewards.ready import Answer


def main(names: list[str]) -> None:
    replies = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a reward prints must not stand among the replies
    lines: queue.Queue[str] = queue.Queue()
    threading.Thread(target=read_lines, args=(lines,), daemon=True).start()

    def reply(**content: Any) -> None:
        replies.write(json.dumps(content) + "\n")
        replies.flush()

    if has_environment := "--environment" in names:
        names.remove("--environment")
    functions = []
    for place, name in enumerate(names):
        is_environment = has_environment and place == len(names) - 1
        try:
            functions.append(find(name, "environments" if is_environment else "ready"))
        except BaseException as error:
            return reply(error=f"{name} cannot be imported: {describe(error)}")
    environment = functions.pop() if has_environment else None
    reply()
    while True:
        request = json.loads(lines.get())
        values: list[float] = []
        try:
            if environment is not None and "texts" in request:
                conversation, observation = environment(), None
                conversation.reset(request["prompt"])
                for text in request["texts"]:
                    observation = conversation.step(text)
                reply(observation=None if observation is None else str(observation))
            else:
                for function in functions:
                    values.append(float(function(Answer(**request))))
                reply(values=values)
        except Exception as error:
            reply(error=f"{names[-1] if 'texts' in request else names[len(values)]} raised {describe(error)}")


def read_lines(lines: queue.Queue[str]) -> None:
    """Hand lines on; at the end of the input the training is gone, and a reward that hangs must not stay."""
    for line in sys.stdin:
        lines.put(line)
    os._exit(0)


def find(name: str, ready: str) -> Any:
    """What `module:name` names, or the ready one of that name."""
    module, _, function = name.rpartition(":")
    return getattr(importlib.import_module(module or f"minimind.training.rewards.{ready}"), function)


def describe(error: BaseException) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"[:300]


if __name__ == "__main__":
    main(sys.argv[1:])
