"""The simulated devices, and which of a machine's a process sees. Imports nothing: `nvidia-smi` is made of it."""

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

GIB = 1 << 30
VISIBLE = {"cuda": "CUDA_VISIBLE_DEVICES", "xpu": "ZE_AFFINITY_MASK", "npu": "ASCEND_RT_VISIBLE_DEVICES"}
"""The variables that say which devices a process sees."""


@dataclass(frozen=True)
class Profile:
    """One kind of device."""

    name: str
    capability: tuple[int, int]
    """Of CUDA."""
    memory: int
    """Bytes of one device."""
    processors: int
    is_amd: bool = False
    type: str = "cuda"
    """What torch calls it."""

    @property
    def arch(self) -> str:
        """What torch calls it among the architectures of its build."""
        return "gfx942" if self.is_amd else "sm_{}{}".format(*self.capability)

    @property
    def has_nvidia_smi(self) -> bool:
        """Whether NVIDIA's driver is there, with its program."""
        return self.type == "cuda" and not self.is_amd


PROFILES = {
    "T4": Profile("Tesla T4", (7, 5), 15 * GIB, 40),
    "V100": Profile("Tesla V100-SXM2-32GB", (7, 0), 32 * GIB, 80),
    "A100": Profile("NVIDIA A100-SXM4-80GB", (8, 0), 80 * GIB, 108),
    "H100": Profile("NVIDIA H100 80GB HBM3", (9, 0), 80 * GIB, 132),
    "MI300": Profile("AMD Instinct MI300X", (9, 4), 192 * GIB, 304, is_amd=True),
    "M3": Profile("Apple M3 Max", (0, 0), 27 * GIB, 40, type="mps"),
    "Max1550": Profile("Intel(R) Data Center GPU Max 1550", (0, 0), 64 * GIB, 512, type="xpu"),
    "910B": Profile("Ascend910B2", (0, 0), 64 * GIB, 24, type="npu"),
}


class Machine(NamedTuple):
    """The devices of one host."""

    kind: str = "H100"
    devices: int = 1
    memory: int | None = None
    """Bytes of each; None: the profile's."""
    mig: bool = False
    """Each device is cut into slices, of which CUDA shows a process one."""

    @property
    def profile(self) -> Profile:
        return PROFILES[self.kind]

    @property
    def memory_of_each(self) -> int:
        return self.profile.memory if self.memory is None else self.memory

    def variables(self) -> dict[str, str]:
        """The machine as environment variables, which `read` reads."""
        memory = str(self.memory_of_each)
        said = {"SIMULATED_DEVICE": f"{self.kind},{self.devices},{memory}" + (",mig" if self.mig else "")}
        # DeepSpeed's builders of ops for Ascend look for its toolkit.
        return {**said, "ASCEND_HOME_PATH": os.devnull} if self.profile.type == "npu" else said

    def identifiers(self) -> list[str]:
        """The UUIDs of the devices, or of their slices."""
        word = "MIG" if self.mig else "GPU"
        return [f"{word}-{index:08x}-0000-4000-8000-000000000000" for index in range(1, self.devices + 1)]

    def visible(self, text: str | None) -> list[int]:
        """The devices that a process sees with `text` for its variable of `VISIBLE`: numbers or the beginnings of
        UUIDs, up to the first that names none; of slices, one. A device named twice hides all."""
        if text is None:
            found = list(range(self.devices))
        else:
            found = []
            for word in map(str.strip, text.split(",")):
                if word.isdecimal():
                    index = int(word)
                else:
                    fits = [i for i, name in enumerate(self.identifiers()) if word and name.startswith(word)]
                    index = fits[0] if len(fits) == 1 else self.devices
                if index >= self.devices:
                    break
                found.append(index)
            if len(set(found)) < len(found):
                return []
        return found[:1] if self.mig else found


def read(environment: Mapping[str, str] = os.environ) -> Machine | None:
    """The machine of an environment; None: it has none."""
    text = environment.get("SIMULATED_DEVICE")
    if not text:
        return None
    kind, devices, memory, *mig = text.split(",")
    return Machine(kind, int(devices), int(memory), bool(mig))
