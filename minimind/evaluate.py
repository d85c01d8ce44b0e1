"""Evaluate a trained model: loss, perplexity and bits per byte, multiple-choice accuracy, or needles in long texts.

    python -m minimind.evaluate --checkpoint RUN_OR_STEP_OR_EXPORT --shards DIR
    python -m minimind.evaluate --checkpoint RUN_OR_STEP_OR_EXPORT --text FILES | --multiple-choice FILE
    python -m minimind.evaluate --checkpoint RUN_OR_STEP_OR_EXPORT --shards DIR --needle

Every token of the data is predicted once, in windows of `seq_len` tokens.
"""

import contextlib
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from tqdm import tqdm

from minimind.checkpoints.formats.load_model import load_model, stretch_context
from minimind.cli import parse_flags, without_local_rank
from minimind.data.dataset import Dataset, open_dataset
from minimind.data.mixture import open_mixture, read_mixture
from minimind.data.shards import ShardReader, find_split
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.distributed.environment import RankEnvironment, find_device, is_first_rank, read_environment
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.distributed.process_group import process_group
from minimind.errors import UserError, run_main
from minimind.files import replace_file
from minimind.inference.device import ModelFlags, choose_device
from minimind.inference.evaluation import (
    Evaluation,
    check_vocabulary,
    measure_loss,
    open_shards,
    pair_sums,
    shards_of_texts,
    token_sums,
)
from minimind.inference.multiple_choice import read_questions, score_choices
from minimind.inference.needle import NeedleOptions, find_needles, show_cells
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.packed_weights import quantize_int8
from minimind.schema import AT_LEAST_1, check_fields

OUTPUT_NAME, NEEDLE_NAME = "evaluation.json", "needle.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags(ModelFlags, NeedleOptions):
    """Measure loss, perplexity and bits per byte of a trained model, or what it finds in long texts."""

    shards: str | tuple[str, ...] | None = None
    """A corpus made by data_prep.tokenize_corpus, or one shard folder; or a mixture, as training takes it: each source
    by itself, and the mean by their weights."""
    split: Literal["train", "val"] = "val"
    """Which split of the corpus."""
    text: tuple[Path, ...] = ()
    """Text files instead of shards, each one document."""
    multiple_choice: Path | None = None
    """Questions instead of shards: JSON lines with context, choices and answer (its number, from 0)."""
    needle: bool = False
    """Hide sentences in long texts of the shards, and see whether the model finds them again."""
    rope_scaling_factor: float | None = None
    """Read up to this many times the trained context by YaRN."""
    seq_len: Annotated[int, AT_LEAST_1] = 512
    """Tokens of a window; the first tokens of a window are predicted from little."""
    document_mask: bool = False
    """Keep attention and positions inside a document, as a run with --document-mask was trained."""
    micro_batch_size: Annotated[int, AT_LEAST_1] = 8
    """Windows of one forward."""
    max_samples: Annotated[int | None, AT_LEAST_1] = None
    """Measure this many windows only; None: all."""
    output: Path | None = None
    """JSON file for the result [default: evaluation.json, or needle.json, in the run's or exported model's folder]."""

    def __post_init__(self) -> None:
        if [self.shards is not None, bool(self.text), self.multiple_choice is not None].count(True) != 1:
            raise UserError("give either --shards DIR or --text FILES or --multiple-choice FILE")
        if self.needle and self.multiple_choice is not None:
            raise UserError("needle: hidden in --shards or --text, not in --multiple-choice; leave one out")
        unused = [name for name in vars(NeedleOptions()) if getattr(self, name) != getattr(NeedleOptions(), name)]
        if unused and not self.needle:
            raise UserError(f"{unused[0]}: has no effect without --needle; give both, or leave it out")
        super().__post_init__()
        check_fields(EvaluateFlags, vars(self))


def main(args: Sequence[str] | None = None) -> None:
    """Run the command, as one process or as one of several ranks."""
    env = read_environment()
    flags = parse_flags(EvaluateFlags, without_local_rank(args), prog="python -m minimind.evaluate")
    device, dtype = choose_device(flags.device, flags.precision, int8=flags.int8)
    if env.world_size > 1 and device.type != "cpu":
        device = find_device(env)
    with explain_out_of_memory(device, remedies(flags, dtype), env.rank_label):
        run(flags, env, device, dtype)


def run(flags: EvaluateFlags, env: RankEnvironment, device: torch.device, dtype: torch.dtype) -> None:
    """Load the model, measure and report. Every rank calls this."""
    model, tokenizer_file = load_model(flags.checkpoint, dtype=dtype, device=device, tokenizer=flags.tokenizer)
    if flags.rope_scaling_factor is not None:
        stretch_context(model, flags.rope_scaling_factor)
    if flags.int8:
        quantize_int8(model)
    ranks = process_group(env, device) if env.world_size > 1 else contextlib.nullcontext()
    with contextlib.ExitStack() as stack:
        if flags.multiple_choice is not None:
            questions = read_questions(flags.multiple_choice)
            stack.enter_context(ranks)
            tokenizer = load_tokenizer(tokenizer_file)
            score = score_choices(model, tokenizer, questions, rank=env.rank, world_size=env.world_size)
            rows = [
                ("accuracy", f"{score.accuracy:.4f}"),
                ("length-normed", f"{score.accuracy_norm:.4f}"),
                ("questions", f"{score.num_questions:,}"),
            ]
            values = asdict(score)
        else:
            dataset = open_data(flags, stack, tokenizer_file)
            reader = dataset.reader
            check_vocabulary(model, reader)
            if reader.manifest.kind == "feedback":
                raise UserError(
                    f"shards: {flags.shards} holds judged answers, which compare no two; give pairs of answers"
                )
            stack.enter_context(ranks)
            if flags.needle:
                report_needles(model, load_tokenizer(tokenizer_file), reader, flags, env)
                return
            found = measure(model, dataset, flags, env)
            rows = [
                ("loss", f"{found.loss:.4f}"),
                ("perplexity", f"{found.perplexity:.3f}"),
                ("bits per byte", "-" if found.bits_per_byte is None else f"{found.bits_per_byte:.4f}"),
                ("tokens", f"{found.num_targets:,} in {found.num_samples:,} windows of {flags.seq_len}"),
            ]
            if reader.manifest.is_pairs:  # the loss is that of the preferred answers, a mean over the pairs
                rows = [(name.replace("_per_", "/"), f"{value:.4f}") for name, value in found.figures.items()]
                rows += [("chosen loss", f"{found.loss:.4f}"), ("pairs", f"{found.num_targets:,}")]
            rows += [(f"loss of {name}", f"{one.loss:.4f}") for name, one in found.sources.items()]
            values = {**asdict(found), "data_fingerprint": dataset.fingerprint}
            values |= values.pop("figures")
    if env.is_first:
        for name, value in [*rows, ("written to", write_result(flags, values))]:
            print(f"{name:<16}{value}")


def open_data(flags: EvaluateFlags, stack: contextlib.ExitStack, tokenizer_file: Path) -> Dataset:
    """The windows to measure; `stack` closes what they need.

    Raises:
        UserError: there are none, or not such.
    """
    named = None if flags.shards is None else read_mixture(flags.shards)
    if named is not None:
        if flags.needle:
            raise UserError("needle: hides sentences in one corpus, not in a mixture; give a single --shards folder")
        places = {source.name: Path(source.folder) for source in named}
        readers = {name: open_shards(at, flags.split) for name, at in places.items() if find_split(at, flags.split)}
        if not readers:
            raise UserError(f"shards: no source has a {flags.split} split; prepare one with --val-fraction above 0")
        return open_mixture(named, readers, [], flags.seq_len, flags.document_mask, keep_tail=True)
    if flags.shards is None:
        reader = stack.enter_context(shards_of_texts(flags.text, tokenizer_file))
    else:
        reader = open_shards(Path(flags.shards if isinstance(flags.shards, str) else flags.shards[0]), flags.split)
    return open_dataset(reader, flags.seq_len, flags.document_mask, keep_tail=True)


def report_needles(
    model: MiniMindForCausalLM, tokenizer: Tokenizer, reader: ShardReader, flags: EvaluateFlags, env: RankEnvironment
) -> None:
    """Hide needles, look for them and print what was found. Every rank calls this."""
    with tqdm(desc="evaluating", unit="text", disable=not env.is_first or not sys.stderr.isatty()) as bar:
        cells = find_needles(
            model, tokenizer, reader, flags, rank=env.rank, world_size=env.world_size, after_test=bar.update
        )
    if env.is_first:
        values = {"cells": [asdict(cell) for cell in cells], "data_fingerprint": reader.fingerprint}
        print(f"{show_cells(cells)}\n\nwritten to {write_result(flags, values)}")


def measure(model: MiniMindForCausalLM, dataset: Dataset, flags: EvaluateFlags, env: RankEnvironment) -> Evaluation:
    """The loss over a data set, with a progress bar. Every rank calls this.

    Raises:
        UserError: the loss is NaN or infinite, or there is no target.
    """
    num_samples = min(flags.max_samples or len(dataset), len(dataset))
    num_batches = -(-num_samples // (flags.micro_batch_size * env.world_size))
    quiet = not env.is_first or not sys.stderr.isatty()
    with tqdm(total=num_batches, desc="evaluating", unit="batch", disable=quiet) as bar:
        found = measure_loss(
            model,
            dataset,
            model.lm_head.weight.device,
            micro_batch_size=flags.micro_batch_size,
            max_samples=flags.max_samples,
            dp_rank=env.rank,
            dp_size=env.world_size,
            before_batch=bar.update,
            sums=pair_sums if dataset.reader.manifest.is_pairs else token_sums,
        )
    if not math.isfinite(found.loss):
        raise UserError(
            f"the loss over {found.num_targets} tokens is {found.loss}: the model's weights or the data are bad"
        )
    return found


def remedies(flags: EvaluateFlags, dtype: torch.dtype) -> list[str]:
    """Flags that lower the memory of an evaluation."""
    found = ["pass --precision bf16"] if dtype == torch.float32 else []
    if flags.multiple_choice is not None:
        return [*found, f"shorten the questions of {flags.multiple_choice}"]
    if flags.needle:
        return [*found, "shorten --needle-lengths"]
    if flags.micro_batch_size > 1:
        found.insert(0, f"lower --micro-batch-size {flags.micro_batch_size}")
    return [*found, f"shorten --seq-len {flags.seq_len}"]


def write_result(flags: EvaluateFlags, values: dict[str, Any]) -> Path:
    """Write figures and flags as JSON; gives the file."""
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(flags).items() if name != "output"}
    settings["text"] = [str(file) for file in flags.text]
    output = flags.output or output_folder(flags.checkpoint) / (NEEDLE_NAME if flags.needle else OUTPUT_NAME)
    try:
        replace_file(output, json.dumps({**values, **settings}, indent=1) + "\n")
    except OSError as error:
        raise UserError(f"cannot write {output}: {error.strerror}; give another --output") from None
    return output


def output_folder(checkpoint: Path) -> Path:
    """The run that a checkpoint `RUN/checkpoints/step_XXXXXXXX` belongs to, or the folder itself."""
    resolved = checkpoint.resolve()
    return resolved.parent.parent if resolved.parent.name == "checkpoints" else checkpoint


if __name__ == "__main__":
    run_main(main, quiet=not is_first_rank())
