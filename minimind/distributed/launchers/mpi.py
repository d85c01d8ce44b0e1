"""Under mpirun: find rank 0's address and a free port through MPI, once, at the start.

mpirun's variables give a rank its number but not the address of rank 0. MPI is finalized again afterwards. Not
DeepSpeed's `mpi_discovery`: it takes the first address of `hostname -I` and one fixed port for every job, and a libmpi
that does not belong to mpirun makes each rank believe it is alone.
"""

import dataclasses
import os
import sys

import mpi4py

from minimind.distributed.environment import RankEnvironment, node_name
from minimind.distributed.launchers.local import find_free_port
from minimind.errors import OneRankError, first_line

# The version of its library by launcher, by which mpi4py is linked.
_LIBRARIES = {"openmpi": "40", "mpich": "12"}


def find_master(env: RankEnvironment) -> RankEnvironment:
    """`env` with rank 0's address and a free port of its host, if mpirun started this rank.

    MASTER_ADDR and MASTER_PORT in the environment take precedence. Every rank calls this.

    Raises:
        OneRankError: libmpi is not found, or does not belong to the mpirun that started the rank.
    """
    if env.launcher not in _LIBRARIES or env.master_addr is not None or env.world_size == 1:
        return env
    if "MPI4PY_LIBMPI" not in os.environ:
        # A host may have both; the variables tell which mpirun this is. A wheel's library is installed beside Python.
        name = ("libmpi.{}.dylib" if sys.platform == "darwin" else "libmpi.so.{}").format(_LIBRARIES[env.launcher])
        os.environ["MPI4PY_LIBMPI"] = os.pathsep.join([os.path.join(sys.prefix, "lib", name), name])
    mpi4py.rc.initialize = False
    mpi4py.rc.finalize = False
    try:
        from mpi4py import MPI  # noqa: PLC0415  (loads the library that was chosen above)
    except (ImportError, RuntimeError) as error:
        raise OneRankError(
            f"rank {env.rank} on {node_name()}: no library of {env.launcher} found ({first_line(error)}); set "
            "MPI4PY_LIBMPI to the libmpi that belongs to mpirun, or MASTER_ADDR to rank 0's host"
        ) from None
    MPI.Init()
    world = MPI.COMM_WORLD
    if (world.rank, world.size) != (env.rank, env.world_size):
        found = MPI.Get_library_version().split(",")[0].splitlines()[0]
        raise OneRankError(
            f"rank {env.rank} of {env.world_size} on {node_name()}: {found} takes it for rank {world.rank} of "
            f"{world.size}; set MPI4PY_LIBMPI to the libmpi that belongs to mpirun"
        )
    hosts = world.allgather(MPI.Get_processor_name())
    address = "127.0.0.1" if len(set(hosts)) == 1 else hosts[0]
    port = world.bcast(env.master_port if "MASTER_PORT" in os.environ else find_free_port())
    MPI.Finalize()
    return dataclasses.replace(env, master_addr=address, master_port=port)
