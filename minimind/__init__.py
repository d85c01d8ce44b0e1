"""MiniMind on DeepSpeed: a plain PyTorch language model, trained by DeepSpeed from outside.

For Python and notebooks (see docs/en/python.md):

    import minimind
    m = minimind.load("runs/first")            # or a checkpoint, an export, a Hugging Face folder, a .pth
    print(minimind.generate(m, "Once upon a time", max_new_tokens=100))

Every name is imported when it is first used: `import minimind` alone loads no torch.
"""

import importlib
import logging
import os
import sys
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers: the names of _HOMES
    from minimind.checkpoints.formats.load_model import load as load
    from minimind.checkpoints.formats.load_model import load_weights as load_weights
    from minimind.data.dataset import load_shards as load_shards
    from minimind.inference.language_model import LanguageModel as LanguageModel
    from minimind.inference.language_model import generate as generate
    from minimind.inference.language_model import score as score
    from minimind.inference.language_model import stream as stream
    from minimind.model.config import ModelConfig as ModelConfig
    from minimind.model.presets import PRESETS as PRESETS
    from minimind.model.transformer import MiniMindForCausalLM as MiniMindForCausalLM

__version__ = "0.1.0"

_HOMES = {
    "LanguageModel": "minimind.inference.language_model",
    "MiniMindForCausalLM": "minimind.model.transformer",
    "ModelConfig": "minimind.model.config",
    "PRESETS": "minimind.model.presets",
    "generate": "minimind.inference.language_model",
    "load": "minimind.checkpoints.formats.load_model",
    "load_shards": "minimind.data.dataset",
    "load_weights": "minimind.checkpoints.formats.load_model",  # MiniMindForCausalLM.from_pretrained
    "score": "minimind.inference.language_model",
    "stream": "minimind.inference.language_model",
}
__all__ = [name for name in _HOMES if name != "load_weights"]


def __getattr__(name: str) -> Any:
    """Import a public name at its first use (PEP 562)."""
    if name not in _HOMES:
        raise AttributeError(f"module 'minimind' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOMES[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})


class _Package(ModuleType):
    """Keeps `minimind.generate` the function.

    Python sets every submodule as an attribute of its package, so importing the command `minimind.generate` would put
    the module in the function's place.
    """

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _HOMES and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package


def openmp_environment(environment: Mapping[str, str]) -> dict[str, str]:
    """Variables to set before torch is loaded, so that OpenMP threads spin between matmuls instead of sleeping.

    libgomp spins briefly between parallel regions, but hardly at all once a process has more threads in teams than
    cores; every small operation then takes twice as long. ACTIVE with libgomp's usual count keeps it spinning for some
    ten microseconds, though not through the longer pauses of ZeRO 3: there `cpu_gather` keeps gloo from creating such
    teams. LLVM's OpenMP gets its default of 200 ms. Empty if OMP_WAIT_POLICY is already set.
    """
    if "OMP_WAIT_POLICY" in environment:
        return {}
    usual = {"OMP_WAIT_POLICY": "ACTIVE", "GOMP_SPINCOUNT": "300000", "KMP_BLOCKTIME": "200"}
    return {name: value for name, value in usual.items() if name not in environment}


os.environ.update(openmp_environment(os.environ))  # torch reads them when it is loaded

# DeepSpeed warns at import on every machine without a GPU; a run prints its device anyway.
logging.getLogger("DeepSpeed").addFilter(lambda record: "Setting accelerator to CPU" not in record.getMessage())
