"""Who a rank is under each launcher, and the process group of one and of two."""

import os
import socket
from datetime import timedelta

import deepspeed
import pytest
import torch
from training_runs import rank_pool

from minimind.distributed import collectives
from minimind.distributed import environment as rank_environment
from minimind.distributed.environment import RankEnvironment, find_device, read_environment
from minimind.distributed.process_group import process_group, share_cores
from minimind.distributed.watchdog import MARGIN_SECONDS
from minimind.errors import UserError

TORCHRUN = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "MASTER_ADDR": "n0",
    "MASTER_PORT": "1234",
}  # fmt: skip
DEEPSPEED = {
    "RANK": "3", "WORLD_SIZE": "4", "LOCAL_RANK": "1", "LOCAL_SIZE": "2", "MASTER_ADDR": "n0", "MASTER_PORT": "29501",
}  # fmt: skip
SLURM = {
    "SLURM_PROCID": "4", "SLURM_NTASKS": "5", "SLURM_LOCALID": "1", "SLURM_NODEID": "1", "SLURM_STEP_ID": "0",
    "SLURM_STEP_TASKS_PER_NODE": "3,2", "MASTER_ADDR": "n0",
}  # fmt: skip
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_SIZE": "4", "OMPI_COMM_WORLD_LOCAL_RANK": "0",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
}  # fmt: skip
MPICH = {"PMI_RANK": "1", "PMI_SIZE": "2", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}


@pytest.mark.parametrize(
    ("environment", "expected"),
    [
        ({}, RankEnvironment()),
        (TORCHRUN, RankEnvironment(3, 1, 4, 2, "n0", 1234, "torch")),
        (DEEPSPEED, RankEnvironment(3, 1, 4, 2, "n0", 29501, "torch")),
        ({"RANK": "0", "WORLD_SIZE": "1"}, RankEnvironment(0, 0, 1, 1, None, 29500, "torch")),
        (SLURM, RankEnvironment(4, 1, 5, 2, "n0", 29500, "slurm")),
        (OPEN_MPI, RankEnvironment(2, 0, 4, 2, None, 29500, "openmpi")),
        (MPICH, RankEnvironment(1, 1, 2, 2, None, 29500, "mpich")),
        # The launchers' own names win inside a SLURM job, and a batch script without srun is one process.
        ({**SLURM, **TORCHRUN}, RankEnvironment(3, 1, 4, 2, "n0", 1234, "torch")),
        ({**SLURM, **MPICH}, RankEnvironment(1, 1, 2, 2, "n0", 29500, "mpich")),
        ({"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}, RankEnvironment()),
        # srun with its PMI plugin sets two of MPICH's names and no local rank.
        ({**SLURM, "PMI_RANK": "4", "PMI_SIZE": "5"}, RankEnvironment(4, 1, 5, 2, "n0", 29500, "slurm")),
    ],
)  # fmt: skip
def test_each_launcher_says_who_this_is(environment, expected):
    assert read_environment(environment) == expected
    assert read_environment(environment).is_first == (expected.rank == 0)


@pytest.mark.parametrize(
    ("tasks", "node", "local_id", "size"), [("2(x3),1", 2, 0, 2), ("2(x3),1", 3, 0, 1), ("8", 0, 7, 8)]
)
def test_slurm_gives_every_rank_of_a_node_the_same_size(tasks, node, local_id, size):
    values = {"SLURM_STEP_TASKS_PER_NODE": tasks, "SLURM_NODEID": str(node), "SLURM_LOCALID": str(local_id)}
    world = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_STEP_ID": "0"}
    assert read_environment({**world, **values}).local_world_size == size


@pytest.mark.parametrize(
    ("environment", "words"),
    [
        ({"RANK": "0"}, "WORLD_SIZE: not set"),
        ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK: not set"),
        ({"RANK": "two", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK: 'two' is no number"),
        ({"RANK": "-1", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK: '-1' is no number"),
        ({"RANK": "", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK: '' is no number"),
        ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK: 2 is not below WORLD_SIZE 2"),
        ({**TORCHRUN, "MASTER_PORT": "http"}, "MASTER_PORT: 'http' is no number"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "x"}, "LOCAL_WORLD_SIZE: 'x' is no number"),
        ({"PMI_RANK": "0", "PMI_SIZE": "2"}, "MPI_LOCALRANKID: not set"),
    ],
)
def test_variables_that_disagree_are_one_line(environment, words):
    with pytest.raises(UserError) as error:
        read_environment(environment)
    assert words in str(error.value)


def fake_cuda(monkeypatch, count: int) -> None:
    monkeypatch.setattr(rank_environment, "accelerator_type", lambda: "cuda" if count else None)
    monkeypatch.setattr(rank_environment, "count_devices", lambda: count)
    monkeypatch.delenv("SLURM_STEP_GPUS", raising=False)


def test_each_rank_takes_its_device(monkeypatch):
    fake_cuda(monkeypatch, 0)
    assert find_device(RankEnvironment(local_rank=1, local_world_size=2)) == torch.device("cpu")
    fake_cuda(monkeypatch, 4)
    assert find_device(RankEnvironment(local_rank=3, local_world_size=4)) == torch.device("cuda", 3)
    with pytest.raises(UserError, match="local rank 4 of 5: this host has 4 cuda devices"):
        find_device(RankEnvironment(local_rank=4, local_world_size=5))
    fake_cuda(monkeypatch, 1)
    with pytest.raises(UserError, match="local rank 1 of 2: this host has 1 cuda devices"):
        find_device(RankEnvironment(local_rank=1, local_world_size=2))
    # CUDA_VISIBLE_DEVICES=$SLURM_LOCALID, or srun --gpus-per-task=1: each task is shown one device, as number 0.
    for visible in ("1", "GPU-00000002", "MIG-00000002"):
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
        assert find_device(RankEnvironment(local_rank=1, local_world_size=2)) == torch.device("cuda", 0)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "0")
    with pytest.raises(UserError, match="this host has 1 cuda devices"):
        find_device(RankEnvironment(local_rank=1, local_world_size=2))
    monkeypatch.setenv("SLURM_STEP_GPUS", "1")
    assert find_device(RankEnvironment(local_rank=1, local_world_size=2)) == torch.device("cuda", 0)


def test_a_device_can_be_demanded_and_a_gpu_that_torch_cannot_use_is_told(monkeypatch, tmp_path):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    fake_cuda(monkeypatch, 2)
    assert find_device(RankEnvironment(), "cpu") == torch.device("cpu")
    assert find_device(RankEnvironment(), "cuda") == torch.device("cuda", 0)
    fake_cuda(monkeypatch, 0)
    with pytest.raises(UserError, match=r"--device cuda: torch .* finds no GPU: update the driver"):
        find_device(RankEnvironment(), "cuda")
    monkeypatch.setattr(rank_environment, "NVIDIA_DEVICE", tmp_path)
    with pytest.raises(UserError, match="finds no GPU: update the driver, install torch for this device, or"):
        find_device(RankEnvironment())
    for name, value in (("CUDA_VISIBLE_DEVICES", ""), ("DS_ACCELERATOR", "cpu")):
        with monkeypatch.context() as hidden:
            hidden.setenv(name, value)
            assert find_device(RankEnvironment()) == torch.device("cpu")


@pytest.fixture
def clean_environment(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "x")  # so that what the code sets is taken back
        monkeypatch.delenv(name)


def test_a_group_of_one_needs_no_port_and_can_be_made_again(clean_environment):
    for _ in range(2):
        with process_group(RankEnvironment(), torch.device("cpu")):
            assert torch.distributed.get_world_size() == 1 and deepspeed.comm.is_initialized()
            assert collectives.all_reduce_sum(torch.tensor([2.0])).item() == 2.0
            assert collectives.broadcast_object({"a": 1}) == {"a": 1}
            assert collectives.gather_objects("x") == ["x"]
            # DeepSpeed clones the world on first use, and must not meet the clone of a group that is gone.
            clone = deepspeed.utils.groups._clone_world_group()
            assert deepspeed.comm.get_global_rank(clone, 0) == 0
            assert clone is torch.distributed.group.WORLD, "a second set of connections"
        assert not torch.distributed.is_initialized() and not deepspeed.comm.is_initialized()


def test_nccl_is_told_its_device_and_fails_after_the_watchdog(monkeypatch, clean_environment):
    given = []

    def init(backend: str, *, device_id: torch.device | None, timeout: timedelta, **options: object) -> None:
        given.append((device_id, timeout.total_seconds()))
        raise torch.distributed.DistNetworkError("not here")

    monkeypatch.setattr(torch.distributed, "init_process_group", init)
    monkeypatch.setattr(torch.accelerator, "set_device_index", lambda device: None)
    second, cpu = torch.device("cuda", 1), torch.device("cpu")
    for size, device in ((1, second), (2, second), (2, cpu)):
        env, store = RankEnvironment(world_size=size), torch.distributed.HashStore()
        with pytest.raises(UserError, match="not here"), process_group(env, device, store=store):
            pass
    # A collective on CUDA fails later than the watchdog, which says where every rank is.
    assert given == [(None, 1860), (second, 1860), (None, 1800)] and MARGIN_SECONDS < 60


def test_the_group_is_left_when_the_run_fails(clean_environment):
    with pytest.raises(ZeroDivisionError), process_group(RankEnvironment(), torch.device("cpu")):
        raise ZeroDivisionError
    assert not torch.distributed.is_initialized()


def test_a_taken_port_is_one_line(clean_environment):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        env = RankEnvironment(
            world_size=2, local_world_size=2, master_addr="127.0.0.1", master_port=taken.getsockname()[1]
        )
        with (
            pytest.raises(
                UserError, match=r"rank 0 on .*: no process group at MASTER_ADDR 127.0.0.1 MASTER_PORT \d+: "
            ),
            process_group(env, torch.device("cpu"), timeout_minutes=0.05),
        ):
            pass


def test_cores_are_shared_among_the_ranks_of_a_host(monkeypatch):
    cores = len(os.sched_getaffinity(0))
    before = torch.get_num_threads()
    try:
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        share_cores(RankEnvironment(local_world_size=2 * cores))
        assert torch.get_num_threads() == 1
        share_cores(RankEnvironment(local_world_size=1))
        assert torch.get_num_threads() == cores
        monkeypatch.setenv("OMP_NUM_THREADS", "1")
        torch.set_num_threads(1)
        share_cores(RankEnvironment(local_world_size=1))
        assert torch.get_num_threads() == 1
    finally:
        torch.set_num_threads(before)


def use_collectives() -> dict:
    env = read_environment()
    with process_group(env, find_device(env)):
        rank = env.rank
        return {
            "sum": collectives.all_reduce_sum(torch.tensor([float(rank + 1)])).item(),
            "broadcast": collectives.broadcast_object(("from", rank)),
            "gather": collectives.gather_objects(rank * 10),
            "ints": collectives.all_reduce_ints([rank, 1], torch.add),
            "shared": collectives.lead_from_first_rank(lambda share: share(abs, [-1, -2, -3])),
            "connects at once": os.environ["TORCH_GLOO_LAZY_INIT"] != "1",
        }


def test_collectives_of_two_ranks_twice_in_the_same_processes():
    for pool in rank_pool(2):
        for _ in range(2):
            for result in pool.run(use_collectives):
                assert result == {
                    "sum": 3.0, "broadcast": ("from", 0), "gather": [0, 10], "ints": [1, 2], "shared": [1, 2, 3],
                    "connects at once": False,
                }  # fmt: skip


def test_only_rank_0_logs(capsys, monkeypatch, clean_environment):
    collectives.log("one")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_RANK", "1")
    collectives.log("two")
    assert capsys.readouterr().out == "one\n"


def test_a_rank_among_several_names_itself_and_its_host(monkeypatch):
    monkeypatch.setenv("SLURMD_NODENAME", "node7")
    assert RankEnvironment(rank=3, world_size=4).rank_label == "rank 3 on node7"
    assert RankEnvironment().rank_label == ""
