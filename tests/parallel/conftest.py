"""A process group of this process alone, for the tests that build engines in it."""

from collections.abc import Iterator

import pytest
from engine_runs import CPU

from minimind.distributed.environment import RankEnvironment
from minimind.distributed.process_group import process_group


@pytest.fixture(scope="module")
def group() -> Iterator[None]:
    """For `pytest.mark.usefixtures`: engines are built in it, and it ends with the module."""
    with pytest.MonkeyPatch.context() as patch:
        for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"):
            patch.setenv(name, "0")
            patch.delenv(name)
        with process_group(RankEnvironment(), CPU):
            yield
