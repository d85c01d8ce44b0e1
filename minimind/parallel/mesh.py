"""The mesh of ranks: who shares a layer, who shares a sequence, and who averages gradients.

Data x sequence x tensor, the last innermost: it exchanges the most, so its ranks are neighbours inside a node. With
dp 2, sp 2 and tp 2 on two nodes of four:

                      node 0                    node 1
    data         0           0             1           1
    sequence     0           1             0           1
    tensor     0   1       0   1         0   1       0   1
    rank       0   1       2   3         4   5       6   7

    tensor group      0 1 | 2 3 | 4 5 | 6 7     one layer's parts, of the same tokens
    sequence group    0 2 | 1 3 | 4 6 | 5 7     one sequence's parts
    averaging group   0 2 4 6 | 1 3 5 7         the same weights, other tokens (data x sequence)
    expert group      ep_size neighbours of an averaging group (DeepSpeed cuts it from there)

DeepSpeed is told of tensor groups and averaging groups alone: a part of a sequence is to it a data-parallel rank like
any other. Were it told of sequence groups, it would sum gradients over them, but at ZeRO 3 with `reduce_scatter`
average them all the same, and with `sequence_parallel_size` in its JSON alone it would average them everywhere.
"""

from dataclasses import dataclass
from typing import Any

import torch.distributed
from torch.distributed import ProcessGroup

from minimind.config.resolved_run import ResolvedRun


@dataclass(frozen=True)
class Mesh:
    """This rank's place, and its groups."""

    dp_size: int
    sp_size: int
    tp_size: int
    rank: int = 0
    tensor: ProcessGroup | None = None
    """None where `tp_size` is 1."""
    sequence: ProcessGroup | None = None
    """None where `sp_size` is 1."""
    averaging: ProcessGroup | None = None
    """None: all ranks."""

    @property
    def tp_rank(self) -> int:
        """Which part of each layer is this rank's."""
        return self.rank % self.tp_size

    @property
    def sp_rank(self) -> int:
        """Which part of each sequence is this rank's."""
        return self.rank // self.tp_size % self.sp_size

    @property
    def dp_rank(self) -> int:
        """Which of the samples of a step are this rank's."""
        return self.rank // (self.tp_size * self.sp_size)

    @property
    def num_averaging(self) -> int:
        """Ranks of an averaging group."""
        return self.dp_size * self.sp_size

    @property
    def averaging_rank(self) -> int:
        """This rank's number in its averaging group."""
        return self.rank // self.tp_size

    @property
    def mpu(self) -> "Mpu | None":
        """What DeepSpeed asks for groups; None where all ranks average gradients, which is what it takes by itself."""
        return None if self.tp_size == 1 else Mpu(self)

    def groups(self) -> dict[str, list[list[int]]]:
        """The ranks of every group, by kind."""
        size = self.dp_size * self.sp_size * self.tp_size
        ranks = torch.arange(size).view(self.dp_size, self.sp_size, self.tp_size)
        return {
            "tensor": ranks.flatten(0, 1).tolist(),
            "sequence": ranks.transpose(1, 2).flatten(0, 1).tolist(),
            "averaging": ranks.flatten(0, 1).T.tolist(),
        }


ALONE = Mesh(1, 1, 1)


def make_mesh(resolved: ResolvedRun) -> Mesh:
    """The mesh of a run, inside its process group. Every rank calls this, once: it makes the groups."""
    train = resolved.train
    mesh = Mesh(resolved.dp_size, train.sp_size, train.tp_size, torch.distributed.get_rank())
    if mesh.sp_size == mesh.tp_size == 1:
        return mesh
    sizes = {"tensor": mesh.tp_size, "sequence": mesh.sp_size, "averaging": mesh.tp_size}
    made: dict[str, Any] = {}
    for kind, ranks in mesh.groups().items():
        if sizes[kind] > 1:
            made[kind], _ = torch.distributed.new_subgroups_by_enumeration(ranks, group_desc=kind)
    return Mesh(mesh.dp_size, mesh.sp_size, mesh.tp_size, mesh.rank, **made)


class Mpu:
    """The mesh in the words of Megatron's "model parallel unit", which DeepSpeed asks.

    Its data-parallel ranks are those of an averaging group, also where it checks the batch: see `deepspeed_batch`.
    """

    def __init__(self, mesh: Mesh) -> None:
        self._mesh = mesh

    def get_data_parallel_group(self) -> ProcessGroup | None:
        return self._mesh.averaging

    def get_data_parallel_world_size(self) -> int:
        return self._mesh.num_averaging

    def get_data_parallel_rank(self) -> int:
        return self._mesh.averaging_rank

    def get_model_parallel_group(self) -> ProcessGroup | None:
        return self._mesh.tensor

    def get_model_parallel_world_size(self) -> int:
        return self._mesh.tp_size

    def get_model_parallel_rank(self) -> int:
        return self._mesh.tp_rank

    get_tensor_model_parallel_group = get_model_parallel_group
    get_tensor_model_parallel_world_size = get_model_parallel_world_size
    get_tensor_model_parallel_rank = get_model_parallel_rank


def deepspeed_batch(resolved: ResolvedRun) -> dict[str, Any]:
    """`train_batch_size` as DeepSpeed's arithmetic wants it, which counts parts of sequences as sequences."""
    return {"train_batch_size": resolved.train.global_batch_size * resolved.train.sp_size}
