"""Hundreds of ranks as threads, which count instead of being timed: what a rank sends, asks and opens at start, in a
step, at a save and at a resume.

The project's own code runs, on one real key-value store and real files; torch's messages are queues. `hops` is the
longest chain of messages of which each waits for the one before; a send takes its sender one as well.
"""

import collections
import contextlib
import pickle
import queue
import sys
import threading
import unittest.mock
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
import torch.distributed
from deepspeed.utils.mixed_precision_linkage import lazy_init_hp_params_optimizer_state, link_hp_params

from minimind import files
from minimind.checkpoints import manifest, zero_partitions
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.manifest import TrainState
from minimind.checkpoints.reshard import load_resharded
from minimind.checkpoints.run_state import DataFingerprint
from minimind.checkpoints.saving import CheckpointSaver
from minimind.checkpoints.zero_partitions import read_cut
from minimind.config.resolve import resolve_run
from minimind.config.run_config import RunConfig
from minimind.data.dataset import TokenDataset
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import ShardReader
from minimind.distributed import collectives, heartbeats, preflight, startup, watchdog
from minimind.distributed.collectives import lead_from_first_rank
from minimind.distributed.environment import RankEnvironment
from minimind.distributed.stop_requests import StopRequests
from minimind.distributed.watchdog import Watchdog
from minimind.model.config import ModelConfig
from minimind.model.transformer import MiniMindForCausalLM
from minimind.training import run_folder
from minimind.training.run_folder import open_run_folder

GPUS_A_HOST = 8
SHARDS = 512
MODEL = {
    "vocab_size": 300,
    "hidden_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
}
Counts = dict[str, float]


class World:
    """`size` ranks as threads; what each has sent, asked and opened since `reset`."""

    def __init__(self, size: int) -> None:
        self.size, self._own = size, threading.local()
        self._boxes: dict[tuple[int, int], queue.SimpleQueue] = collections.defaultdict(queue.SimpleQueue)
        self.stores: list[CountingStore] = []
        self.peers: list[set[int]] = [set() for _ in range(size)]
        self.reset()

    def reset(self) -> None:
        self.counts: list[collections.Counter] = [collections.Counter() for _ in range(self.size)]
        self.clocks = [0] * self.size

    @property
    def rank(self) -> int:
        return getattr(self._own, "rank", 0)

    def count(self, what: str, number: int = 1) -> None:
        if hasattr(self._own, "rank"):
            self.counts[self.rank][what] += number

    @contextlib.contextmanager
    def counting(self) -> Iterator[None]:
        """Count the files that are opened, also by the threads that a rank has work done by."""

        def audit(event: str, args: tuple) -> None:
            if event == "open" and self._is_counting:
                self.count("opened")

        def share(function: Callable[[Any], Any], items: Any) -> list[Any]:
            return [function(item) for item in items]

        sys.addaudithook(audit)  # for the life of the process
        self._is_counting = True
        try:
            with unittest.mock.patch.object(collectives, "share_among_threads", share):
                yield
        finally:
            self._is_counting = False

    def run(self, work: Callable[[int], Any]) -> dict[str, Counts]:
        """`work(rank)` on every rank at once; of each count the most of any rank, and the sum."""
        errors: list[BaseException] = []
        self.reset()

        def live(rank: int) -> None:
            self._own.rank = rank
            try:
                work(rank)
            except BaseException as error:
                errors.append(error)

        threads = [threading.Thread(target=live, args=(rank,), daemon=True) for rank in range(self.size)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(300)
        if errors:
            raise errors[0]
        most = {what: max(count[what] for count in self.counts) for count in self.counts for what in count}
        return {
            "most": {**most, "hops": max(self.clocks)},
            "sum": {what: sum(count[what] for count in self.counts) for what in most},
        }

    def send(self, value: Any, dst: int) -> Any:
        self.clocks[self.rank] += 1
        self.count("messages")
        self.peers[self.rank].add(dst)
        self.peers[dst].add(self.rank)
        content = value.clone() if isinstance(value, torch.Tensor) else pickle.dumps(value)
        self._boxes[self.rank, dst].put((self.clocks[self.rank], content))
        return SimpleNamespace(wait=lambda: True)

    def recv(self, value: Any, src: int) -> None:
        clock, content = self._boxes[src, self.rank].get(timeout=120)
        self.clocks[self.rank] = max(self.clocks[self.rank], clock)
        if isinstance(value, torch.Tensor):
            value.copy_(content)
        else:
            value[:] = pickle.loads(content)

    def broadcast(self, value: list[Any], src: int = 0) -> None:
        """gloo's: a binomial tree."""
        distance = 1
        while distance < self.size:
            if distance <= self.rank < 2 * distance:
                self.recv(value, self.rank - distance)
            elif self.rank < distance and self.rank + distance < self.size:
                self.send(value, self.rank + distance)
            distance *= 2

    @contextlib.contextmanager
    def in_place_of_torch(self) -> Iterator[None]:
        """Let torch's messages go through this world."""
        names: dict[str, Any] = {"send": self.send, "isend": self.send, "recv": self.recv}
        names |= {"send_object_list": self.send, "recv_object_list": self.recv, "is_initialized": lambda: True}
        names |= {"get_rank": lambda group=None: self.rank, "get_world_size": lambda group=None: self.size}
        with unittest.mock.patch.multiple(torch.distributed, broadcast_object_list=self.broadcast, **names):
            yield


class CountingStore(torch.distributed.Store):
    """A rank's connection to the run's store."""

    def __init__(self, world: World, port: int = 0, store: Any = None) -> None:
        super().__init__()
        self._world, self._store = world, store
        world.stores.append(self)  # torch would keep its own half alone
        if store is None:
            limit = timedelta(minutes=5)
            self._store = torch.distributed.TCPStore("127.0.0.1", port, None, False, limit, wait_for_workers=False)

    def clone(self) -> "CountingStore":
        return self


def _counted(name: str) -> Callable[..., Any]:
    def call(self: CountingStore, *args: Any) -> Any:
        self._world.count("asked")
        return getattr(self._store, name)(*args)

    return call


for _name in ("set", "get", "add", "check", "wait", "compare_set", "multi_get", "multi_set", "set_timeout"):
    setattr(CountingStore, _name, _counted(_name))


def environment(rank: int, size: int) -> RankEnvironment:
    return RankEnvironment(rank, rank % GPUS_A_HOST, size, GPUS_A_HOST, "127.0.0.1", 29500, "torch")


def count(size: int, folder: Path) -> dict[str, dict[str, Counts]]:
    """What happens, in the order of a run; of each count the most of any rank and the sum over all."""
    world = World(size)
    shards = write_shards(folder / "shards")
    train = {"run_dir": str(folder / "run"), "steps": 9, "warmup_steps": 1, "global_batch_size": 24 * size}
    run = RunConfig.from_dict({"model": MODEL, "train": train})
    resolved, on_fewer = (
        resolve_run(run, {"zero_optimization": {"stage": 1}}, world_size=ranks, local_world_size=GPUS_A_HOST)
        for ranks in (size, size * 3 // 4)
    )
    with world.in_place_of_torch(), world.counting():
        found = dict(start(world, ShardReader(shards, check=False), resolved))
        found["a step's agreement"] = world.run(lambda rank: StopRequests(None).all_reduce((0, 0, 0)))
        found |= save_and_resume(world, shards, resolved, on_fewer)
        found["connections to other ranks"] = {"most": {"open": max(map(len, world.peers))}, "sum": {}}
        reader = ShardReader(shards, check=False)

        def read(rank: int) -> None:
            if rank == 0:
                for start in range(0, reader.num_tokens - 8, 8):
                    reader.read(start, 9)

        found |= {name: world.run(read) for name in ("windows at first", "windows later")}
    return found


def write_shards(folder: Path) -> Path:
    """`SHARDS` shards of 8 tokens."""
    (folder.parent / "tokenizer.json").write_text("{}")
    writer = ShardWriter(
        folder, vocab_size=300, eos_token_id=0, tokenizer_file=folder.parent / "tokenizer.json", shard_tokens=8
    )
    with writer:
        for _ in range(SHARDS):
            writer.add_document(np.arange(1, 8), 7)
    return folder


def start(world: World, reader: ShardReader, resolved: Any) -> Iterator[tuple[str, dict[str, Counts]]]:
    """From the first connection to a beat of every rank's watchdog."""
    limit = timedelta(minutes=5)
    server = torch.distributed.TCPStore("127.0.0.1", 0, None, True, limit, wait_for_workers=False)
    watchdogs: dict[int, Watchdog] = {}

    def join(rank: int) -> None:
        env = environment(rank, world.size)

        def check_data() -> None:
            reader.check_files(rank, world.size, lists=env.local_rank == 0)

        with startup.join_ranks(resolved, env, torch.device("cpu"), "", check_data, lambda log: None) as (_, own):
            watchdogs[rank] = own

    with contextlib.ExitStack() as stack:
        patch = stack.enter_context
        for module in (startup, preflight):
            patch(unittest.mock.patch.object(module, "node_name", lambda: f"node{world.rank // GPUS_A_HOST}"))
        client = lambda env, minutes: CountingStore(world, server.port)  # noqa: E731
        patch(unittest.mock.patch.object(startup, "connect_store", client))
        # All these ranks are one process, whose sockets are nobody's.
        for module in (watchdog, heartbeats):
            patch(unittest.mock.patch.object(module, "open_connections", lambda port, **options: []))
        patch(unittest.mock.patch.object(watchdog, "drop_dead_connections", lambda port, seconds: None))
        for name in ("_keep_beating", "_watch_itself"):
            patch(unittest.mock.patch.object(Watchdog, name, lambda self: None))
        yield "start", world.run(join)
        yield "a beat", world.run(lambda rank: watchdogs[rank]._exchange(ended=False))


class Engine(SimpleNamespace):
    """A rank's ZeRO-1 engine as far as it is saved and loaded: each weight is its number in the flat vector, and the
    moments are a quarter and a half more."""

    def __init__(self) -> None:
        rank, size = torch.distributed.get_rank(), torch.distributed.get_world_size()
        with torch.device("meta"):
            module = MiniMindForCausalLM(ModelConfig.from_dict(MODEL))
        parameters = dict(module.named_parameters())
        self.shapes = {name: tuple(parameter.shape) for name, parameter in parameters.items()}
        self.start, self.total = 0, sum(map(torch.Tensor.numel, parameters.values()))
        length = -(-self.total // size)
        self.start, self.flat = rank * length, torch.zeros(length)
        states: Any = collections.defaultdict(dict)
        group = list(parameters.values())
        link_hp_params(group, self.flat, {}, None, False, 0, self.start, length, None)
        optimizer = SimpleNamespace(
            bit16_groups=[group],
            fp32_groups_flat_partition=[self.flat],
            optimizer=SimpleNamespace(state=states),
            update_lp_params=lambda: None,
            _lazy_init_hp_params_optimizer_state=lambda: lazy_init_hp_params_optimizer_state(group, self.flat, states),
        )
        names = {parameter: name for name, parameter in parameters.items()}
        super().__init__(checkpoint_engine=None, module=module, optimizer=optimizer, param_names=names)
        self.lr_scheduler = None

    @property
    def wanted(self) -> torch.Tensor:
        return torch.arange(self.start, self.start + len(self.flat)).float()

    def save_checkpoint(self, root: str, tag: str, client_state: Any, **flags: bool) -> None:
        assert not any(flags.values())
        rank, flat = torch.distributed.get_rank(), self.wanted
        state = {"step": torch.tensor(2.0), "exp_avg": flat + 0.25, "exp_avg_sq": flat + 0.5}
        own = {"base_optimizer_state": {"state": {0: state}}, "single_partition_of_fp32_groups": [flat]}
        path = f"{root}/{tag}/zero_pp_rank_{rank}_mp_rank_00_optim_states.pt"
        self.checkpoint_engine.save({"optimizer_state_dict": own}, path)
        if rank == 0:
            counters = dict.fromkeys(("global_steps", "global_samples", "skipped_steps"), 2)
            content = {"module": {}, "buffer_names": [], "param_shapes": [self.shapes], **counters, **client_state}
            self.checkpoint_engine.save(content, f"{root}/{tag}/mp_rank_00_model_states.pt")

    def check_loaded(self) -> None:
        """Raise where something is not what was saved."""
        here = max(0, min(len(self.flat), self.total - self.start))
        state = self.optimizer.optimizer.state[self.flat]
        for tensor, more in ((self.flat, 0), (state["exp_avg"], 0.25), (state["exp_avg_sq"], 0.5)):
            assert torch.equal(tensor[:here], self.wanted[:here] + more)


def save_and_resume(world: World, shards: Path, resolved: Any, on_fewer: Any) -> dict[str, dict[str, Counts]]:
    """A checkpoint from all ranks, and what they read before they continue from it."""
    run_dir, corpus = Path(resolved.train.run_dir), DataFingerprint("f", "t")
    run_dir.mkdir()

    def save(rank: int) -> None:
        saver = CheckpointSaver(Engine(), resolved, corpus, asynchronous=False)  # type: ignore[arg-type]
        saver.start(TrainState(2))
        saver.wait()
        saver.close()

    def hash_and_count(path: Path) -> str:
        world.count("hashed", path.stat().st_size)
        return files.hash_file(path)

    found = {"save": world.run(save)}
    windows = TokenDataset(ShardReader(shards, check=False), resolved.data.seq_len)
    with (
        unittest.mock.patch.object(manifest, "hash_file", hash_and_count),
        unittest.mock.patch.object(run_folder, "identify", lambda windows: corpus),
    ):
        found["resume"] = world.run(
            lambda rank: lead_from_first_rank(lambda share: open_run_folder(resolved, windows, [], share))
        )
        found["resume on fewer ranks"] = resume_on_fewer(World(on_fewer.dp_size), windows, on_fewer)
    return found


def resume_on_fewer(fewer: World, windows: TokenDataset, resolved: Any) -> dict[str, Counts]:
    """What they read of a checkpoint of more; bytes of weights and moments for each parameter of the model."""

    def load(rank: int) -> None:
        resume = lead_from_first_rank(lambda share: open_run_folder(resolved, windows, [], share))
        assert resume is not None and resume.is_resharded
        engine: Any = Engine()
        load_resharded(engine, TrainingCheckpoint(resume.folder, resume.manifest), resolved)
        engine.check_loaded()

    def count_and_read(piece: Any, size: int, place: int, start: int, stop: int) -> torch.Tensor:
        fewer.count("read", 4 * (stop - start))
        return read_cut(piece, size, place, start, stop)

    with (
        fewer.in_place_of_torch(),
        fewer.counting(),
        unittest.mock.patch.object(zero_partitions, "read_cut", count_and_read),
    ):
        found = fewer.run(load)
    total = Engine().total
    return {which: {**counts, "read": round(counts["read"] / total, 4)} for which, counts in found.items()}
