"""Tiny runs on ranks that share sequences or layers, and the plain loop on one process that they are compared with.

The steps are taken by the trainer itself, from shards, with documents that end everywhere.
"""

import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from engine_runs import CPU, MODEL, SETTINGS, plain_optimizer
from torch import nn

from minimind.config.resolve import resolve_run
from minimind.config.resolved_run import ResolvedRun
from minimind.config.run_config import DataConfig, RunConfig, TrainConfig
from minimind.data.dataset import TokenDataset
from minimind.data.loader import BatchLoader
from minimind.data.shard_writer import ShardWriter
from minimind.data.shards import open_split
from minimind.distributed.environment import read_environment
from minimind.distributed.process_group import process_group
from minimind.model import MiniMindForCausalLM, ModelConfig
from minimind.reports.plan import trial

SEQ_LEN, ROWS = 16, 4
Curve = tuple[list[float], list[float]]
"""Losses and gradient norms (before clipping) of the steps."""
Cell = tuple[dict[str, Any], dict[str, Any], dict[str, Any]]
"""Settings of training, of DeepSpeed's JSON, and of the model, all beside the defaults."""


def open_windows(folder: Path, document_mask: bool = True) -> TokenDataset:
    """Random tokens for ten steps, in documents that end anywhere."""
    rng, tokens = np.random.default_rng(0), 10 * ROWS * SEQ_LEN + 1
    tokenizer = folder / "tokenizer.json"
    tokenizer.write_text("{}")
    with ShardWriter(folder / "train", vocab_size=MODEL.vocab_size, eos_token_id=0, tokenizer_file=tokenizer) as writer:
        while tokens > 0:
            document = rng.integers(1, MODEL.vocab_size, rng.integers(1, 20))
            writer.add_document(document, num_bytes=len(document))
            tokens -= len(document) + 1
    return TokenDataset(open_split(folder, "train"), SEQ_LEN, document_mask)


def resolve(world_size: int, cell: Cell) -> ResolvedRun:
    """A run of ROWS windows a step, one in a micro-batch."""
    train, ds, model = cell
    zero = {"stage": 1, "reduce_bucket_size": 5000, "allgather_bucket_size": 5000, **ds.get("zero_optimization", {})}
    settings = {
        **SETTINGS,
        "optimizer": "adamw",
        "micro_batch_size": 1,
        "global_batch_size": ROWS,
        "schedule": "constant",
        "warmup_steps": 0,
        **train,
    }
    document_mask = settings.pop("document_mask", True)
    run = RunConfig(
        ModelConfig(**{**MODEL.to_dict(), **model}),
        DataConfig(seq_len=SEQ_LEN, document_mask=document_mask),
        TrainConfig(**settings),
    )
    return resolve_run(run, {**ds, "zero_optimization": zero}, world_size=world_size, local_world_size=world_size)


def walk(cells: list[Cell], count: int) -> list[Curve]:
    """Train each cell in one process group. Every rank of a pool calls this."""
    env = read_environment()
    torch.set_num_threads(1)
    found = []
    with process_group(env, CPU):
        for cell in cells:
            resolved = resolve(env.world_size, cell)
            with tempfile.TemporaryDirectory() as folder, tempfile.TemporaryDirectory() as other:
                trainer = trial.make_trainer(resolved, env, CPU, Path(other))
                windows = open_windows(Path(folder), resolved.data.document_mask)
                trainer.loader = trial.make_loader(resolved, windows, trainer.mesh, trainer.state, pin_memory=False)
                losses, norms = [], []
                for step in range(count):
                    trainer.train_step(trainer.loader.step_batches(step))
                    loss = trainer._pending[-1].sums.loss.clone()
                    torch.distributed.all_reduce(loss, group=trainer.mesh.averaging)
                    losses.append(float(loss))
                    norms.append(float(trainer._pending[-1].grad_norm))
                trainer.engine.destroy()
            found.append((losses, norms))
    return found


def train_plainly(model: dict[str, Any], count: int, document_mask: bool = True) -> Curve:
    """The same on one process in a few lines of torch, each step's windows as one batch."""
    torch.manual_seed(SETTINGS["seed"])
    module = MiniMindForCausalLM(ModelConfig(**{**MODEL.to_dict(), **model}))
    optimizer = plain_optimizer(module)
    losses, norms = [], []
    with tempfile.TemporaryDirectory() as folder:
        loader = BatchLoader(open_windows(Path(folder), document_mask), SETTINGS["seed"], ROWS, ROWS)
        for step in range(count):
            (batch,) = loader.step_batches(step)
            optimizer.zero_grad()
            output = module(batch.input_ids, batch.labels, cu_seqlens=batch.cu_seqlens)
            (output.loss if output.aux_loss is None else output.loss + output.aux_loss).backward()
            norms.append(float(nn.utils.clip_grad_norm_(module.parameters(), SETTINGS["max_grad_norm"])))
            optimizer.step()
            losses.append(output.loss.item())
    return losses, norms
