"""The simulated device itself: what it refuses, and what it shows of a machine."""

import subprocess

import pytest
from simulated_device import Machine, environment
from simulated_runs import copy_early, raise_out_of_order

WRONG = {
    "used without waiting": "reads on stream",
    "read back without waiting": "without waiting for it",
    "freed while in use": "without record_stream",
}


@pytest.mark.parametrize("how", [*WRONG, "freed and recorded", "waited for"])
def test_streams_out_of_order_are_an_error(one_gpu, how):
    (said,) = one_gpu.run(raise_out_of_order, how)
    assert WRONG.get(how, "") in said and bool(said) == (how in WRONG)


def test_a_figure_is_read_when_its_event_says_so(one_gpu):
    (found,) = one_gpu.run(copy_early)
    early, first, still, second, late = found
    assert (first, second) == (False, True) and late == [1.0, 1.0]
    assert early != late and still != late


@pytest.mark.parametrize(
    ("machine", "text", "expected"),
    [
        (Machine(devices=4), None, [0, 1, 2, 3]),
        (Machine(devices=4), "", []),
        (Machine(devices=4), "-1", []),
        (Machine(devices=4), "2,0", [2, 0]),
        (Machine(devices=4), "1,7,2", [1]),
        (Machine(devices=4), "1,1", []),
        (Machine(devices=4), "GPU-00000003", [2]),
        (Machine(devices=4), "GPU-0000000", []),  # fits all of them
        (Machine(devices=2, mig=True), "MIG-00000002-0000-4000-8000-000000000000", [1]),
        (Machine(devices=2, mig=True), None, [0]),
    ],
)
def test_visible_devices(machine, text, expected):
    assert machine.visible(text) == expected


def test_nvidia_smi_lists_the_devices():
    found = subprocess.run(["nvidia-smi", "-L"], env=environment(Machine("T4", 2)), capture_output=True, text=True)
    assert [line.partition(" (")[0] for line in found.stdout.splitlines()] == ["GPU 0: Tesla T4", "GPU 1: Tesla T4"]
