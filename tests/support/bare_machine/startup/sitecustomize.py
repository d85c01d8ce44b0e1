"""A Python that finds itself on a Mac: see ../__main__.py."""

import contextlib
import importlib.abc
import importlib.machinery
import multiprocessing
import os
import sys

for name in ("sched_getaffinity", "sched_setaffinity", "memfd_create", "pidfd_open", "posix_fadvise"):
    if hasattr(os, name):
        delattr(os, name)

with contextlib.suppress(RuntimeError):  # a process of a pool has been told
    multiprocessing.set_start_method("spawn")


class Mac:
    """`sys` to this project. Other packages choose libraries by it that are not here."""

    platform = "darwin"

    def __getattr__(self, name):
        return getattr(sys, name)

    def __setattr__(self, name, value):
        setattr(sys, name, value)


class Finder(importlib.abc.MetaPathFinder):
    """Finds modules as ever; of this project's it exchanges `sys`, and psutil reads /proc where it is: a Mac's does not
    need it."""

    def find_spec(self, name, path, target=None):
        if name != "psutil" and name.partition(".")[0] not in ("minimind", "data_prep"):
            return None
        spec = importlib.machinery.PathFinder.find_spec(name, path, target)
        if spec is not None and spec.loader is not None:
            run = spec.loader.exec_module

            def exec_module(module):
                run(module)
                if name == "psutil":
                    module.PROCFS_PATH = os.environ["BARE_PROC"]
                elif getattr(module, "sys", None) is sys:
                    module.sys = MAC

            spec.loader.exec_module = exec_module
        return spec


MAC = Mac()
sys.meta_path.insert(0, Finder())
