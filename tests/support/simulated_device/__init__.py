"""A GPU on a machine without one, under the name that torch has for its make: cuda, mps, xpu or npu. Its tensors lie in
host memory, its operators run by their CPU kernels.

A program takes its branches for that device, and is told what a real one would not: each wait of the host with its
place, operators, collectives, allocated bytes and their peak, and an error where a tensor is used on another stream
without waiting for the first. What a make lacks is an error as well: Apple's has no float64, no pinned memory and one
stream, and only CUDA has attention inside flat documents and products of groups. It says nothing about speed, overlap,
numerics of the real kernels, NCCL and its like, Triton or nvcc.

A process has it when its environment is that of `environment(...)`: torch is given the device as soon as it has been
imported. `use` then exchanges the machine within the process.
"""

import os
from pathlib import Path

from simulated_device.profiles import PROFILES, VISIBLE, Machine

STARTUP = Path(__file__).parent / "startup"
"""Holds what a process needs on PYTHONPATH, and `nvidia-smi` for its PATH."""


def environment(machine: Machine, *, visible: str | None = None) -> dict[str, str]:
    """The environment variables of a process on `machine`, over those of this one.

    Args:
        visible: the devices that it sees, for its variable of `VISIBLE`; None: all.
    """
    from simulated_device.build import LIBRARY, build

    support = Path(__file__).parents[1]
    paths = [str(STARTUP), str(support), str(support.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {
        **{name: value for name, value in os.environ.items() if name not in VISIBLE.values()},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([*([str(STARTUP)] if machine.profile.has_nvidia_smi else []), os.environ["PATH"]]),
        LIBRARY: str(build()),
        **machine.variables(),
    }
    return variables if visible is None else {**variables, VISIBLE[machine.profile.type]: visible}


__all__ = ["PROFILES", "STARTUP", "VISIBLE", "Machine", "environment"]
