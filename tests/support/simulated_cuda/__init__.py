"""A CUDA device on a machine without a GPU: its tensors lie in host memory, its operators run by their CPU kernels.

A program takes its CUDA branches on it, and is told what a GPU would not: each wait of the host with its place,
operators, collectives, allocated bytes and their peak, and an error where a tensor is used on another stream without
waiting for the first. It says nothing about speed, overlap, numerics of CUDA's kernels, NCCL, Triton or nvcc.

A process has it when its environment is that of `environment(...)`: torch is given the device as soon as it has been
imported. `use` then exchanges the machine within the process.
"""

import os
from pathlib import Path

from simulated_cuda.profiles import PROFILES, Machine

STARTUP = Path(__file__).parent / "startup"
"""Holds what a process needs on PYTHONPATH, and `nvidia-smi` for its PATH."""


def environment(machine: Machine, *, visible: str | None = None) -> dict[str, str]:
    """The environment variables of a process on `machine`, over those of this one.

    Args:
        visible: CUDA_VISIBLE_DEVICES; None: not set.
    """
    from simulated_cuda.build import LIBRARY, build

    support = Path(__file__).parents[1]
    paths = [str(STARTUP), str(support), str(support.parents[1]), os.environ.get("PYTHONPATH", "")]
    variables = {
        **{name: value for name, value in os.environ.items() if name != "CUDA_VISIBLE_DEVICES"},
        "PYTHONPATH": os.pathsep.join(filter(None, paths)),
        "PATH": os.pathsep.join([*([str(STARTUP)] if machine.profile.has_nvidia_smi else []), os.environ["PATH"]]),
        LIBRARY: str(build()),
        **machine.variables(),
    }
    return variables if visible is None else {**variables, "CUDA_VISIBLE_DEVICES": visible}


__all__ = ["PROFILES", "STARTUP", "Machine", "environment"]
