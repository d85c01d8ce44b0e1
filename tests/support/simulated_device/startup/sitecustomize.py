"""Gives torch the simulated device as soon as it has been imported, in a process whose environment names a machine."""

import importlib.abc
import importlib.machinery
import os
import sys


class _AfterTorch(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path, target=None):
        if name != "torch":
            return None
        sys.meta_path.remove(self)
        spec = importlib.machinery.PathFinder.find_spec(name, path)
        run = spec.loader.exec_module

        def exec_module(module):
            run(module)
            from simulated_device.kinds import install

            install()

        spec.loader.exec_module = exec_module
        return spec


if os.environ.get("SIMULATED_DEVICE"):
    sys.meta_path.insert(0, _AfterTorch())
