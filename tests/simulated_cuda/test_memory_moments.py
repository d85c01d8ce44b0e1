"""What a GPU holds at each moment of a run is what the plan says."""

import pytest
import torch
from memory_moments import MOMENTS, SETTINGS, is_as_planned, measure_moments, title

# The first ones are one rank's, all of them measured on a real GPU; benchmarks/memory.md has more.
ALONE = SETTINGS[:12] if torch.cuda.is_available() else [SETTINGS[number] for number in (0, 3, 5, 8)]


def check(found, record_property):
    figures = {name: f"{found[name] / 2**20:.0f} MiB" for name in ("planned", *MOMENTS)}
    for name, figure in figures.items():
        record_property(name, figure)
    assert is_as_planned(max(found[name] for name in MOMENTS), found["planned"]), figures
    # What is loaded takes the place of what was there.
    assert found["load"] <= found["save"] + 2**24, figures


@pytest.mark.gpu
@pytest.mark.parametrize("one", ALONE, ids=title)
def test_one_gpu_holds_what_was_planned(one_gpu, tmp_path, one, record_property):
    ((found,),) = one_gpu.run(measure_moments, [one], str(tmp_path))
    check(found, record_property)
