"""Says whether an exercise is done: python exercises/check.py N [--solution]

Loads exercises/eNN_*.py (or the solution's file) and runs its check. Exit code 0: right, 1: not yet, 2: no such one.
"""

import importlib.util
import sys
from pathlib import Path
from types import ModuleType

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]

from checks import CHECKS, Wrong  # noqa: E402 - the folders have to be on the path first


def load(number: int, *, solution: bool = False) -> ModuleType:
    """The module of an exercise, or of its solution."""
    folder = HERE / "solutions" if solution else HERE
    path = next(folder.glob(f"e{number:02}_*.py"))
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(number: int, *, solution: bool = False) -> str | None:
    """None when the exercise is right, or one line that says why not."""
    module = load(number, solution=solution)
    try:
        CHECKS[number](module)
    except NotImplementedError:
        return f"not done yet: write it in {module.__file__}"
    except Wrong as error:
        return f"not right: {error}"
    return None


def main() -> int:
    numbers = [int(argument) for argument in sys.argv[1:] if argument.isdigit()]
    if len(numbers) != 1 or numbers[0] not in CHECKS:
        print(f"give one number from 1 to {len(CHECKS)}: bash launch/exercise.sh 1", file=sys.stderr)
        return 2
    answer = check(numbers[0], solution="--solution" in sys.argv)
    print(f"exercise {numbers[0]}: {answer or 'right'}")
    return int(answer is not None)


if __name__ == "__main__":
    sys.exit(main())
