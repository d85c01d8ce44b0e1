"""`python -m minimind.doctor --prove` with its smallest runs, of the dense model alone."""

import unittest.mock
from pathlib import Path

from minimind import doctor
from minimind.reports.doctor import proof_runs, prove


def prove_little(output: str) -> int:
    """The exit code; five or six runs."""
    with (
        unittest.mock.patch.object(prove, "KINDS", {"dense": prove.KINDS["dense"]}),
        unittest.mock.patch.object(prove, "STAGES", (2,)),
        unittest.mock.patch.multiple(
            proof_runs, SIZES=("tiny",), CPU_SEQ_LEN=64, SEQ_LEN=64, LAST_TIMED_STEP=6, WARM_UP_STEPS=1, FEWEST_STEPS=1
        ),
        unittest.mock.patch.object(proof_runs, "KINDS", {"dense": prove.KINDS["dense"]}),
    ):
        return doctor.main(["--prove", "--output", output])


def is_nameless(folder: Path, *names: str) -> bool:
    """Whether none of the names is in a file of the folder."""
    return not any(name in path.read_text() for path in folder.iterdir() for name in names)
