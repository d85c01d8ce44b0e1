"""Evaluate a trained model: loss, perplexity and bits per byte, or multiple-choice accuracy.

    python -m minimind.evaluate --checkpoint RUN_OR_STEP_OR_EXPORT --shards DIR
    python -m minimind.evaluate --checkpoint RUN_OR_STEP_OR_EXPORT --text FILES | --multiple-choice FILE

Every token of the data is predicted once, in windows of `seq_len` tokens.
"""

import contextlib
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import tyro

from minimind.checkpoints.formats.load_model import load_model
from minimind.cli import parse_flags, without_local_rank
from minimind.config.run_config import Precision
from minimind.data.dataset import open_dataset
from minimind.data.shards import ShardReader
from minimind.data.tokenizer import load_tokenizer
from minimind.distributed.environment import RankEnvironment, find_device, is_first_rank, read_environment
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.distributed.process_group import process_group
from minimind.errors import UserError, run_main
from minimind.files import replace_file
from minimind.inference.device import choose_device
from minimind.inference.evaluation import Evaluation, check_vocabulary, evaluate, open_shards, shards_of_texts
from minimind.inference.multiple_choice import ChoiceScore, read_questions, score_choices
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.packed_weights import quantize_int8

OUTPUT_NAME = "evaluation.json"


@dataclass(frozen=True, kw_only=True)
class EvaluateFlags:
    """Measure loss, perplexity and bits per byte of a trained model."""

    checkpoint: Path
    """A run's folder, one of its checkpoints, an exported folder, or a .pth."""
    tokenizer: Path | None = None
    """Tokenizer file or folder, if none is stored beside the weights."""
    shards: Path | None = None
    """A corpus made by data_prep.tokenize_corpus, or one shard folder."""
    split: Literal["train", "val"] = "val"
    """Which split of the corpus."""
    text: tuple[Path, ...] = ()
    """Text files instead of shards, each one document."""
    multiple_choice: Path | None = None
    """Questions instead of shards: JSON lines with context, choices and answer (its number, from 0)."""
    seq_len: int = 512
    """Tokens of a window; the first tokens of a window are predicted from little."""
    document_mask: bool = False
    """Keep attention and positions inside a document, as a run with --document-mask was trained."""
    micro_batch_size: int = 8
    """Windows of one forward."""
    max_samples: int | None = None
    """Measure this many windows only; None: all."""
    precision: Precision | None = None
    """Arithmetic [default: bf16 on a GPU that has it, otherwise fp32]."""
    int8: bool = False
    """On a CPU: 8-bit weights with bf16 arithmetic, as in minimind.generate --int8."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... [default: a GPU where there is one]."""
    output: Path | None = None
    """JSON file for the result [default: evaluation.json in the run's, or the exported model's, folder]."""

    def __post_init__(self) -> None:
        if [self.shards is not None, bool(self.text), self.multiple_choice is not None].count(True) != 1:
            raise UserError("give either --shards DIR or --text FILES or --multiple-choice FILE")
        for name in ("seq_len", "micro_batch_size", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; it must be at least 1")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command, as one process or as one of several ranks."""
    args = without_local_rank(sys.argv[1:] if args is None else args)
    env = read_environment()
    flags = parse_flags(EvaluateFlags, args, default=tyro.MISSING_NONPROP, prog="python -m minimind.evaluate")
    device, dtype = choose_device(flags.device, flags.precision, int8=flags.int8)
    if env.world_size > 1 and device.type == "cuda":
        device = find_device(env)
    with explain_out_of_memory(device, remedies(flags, dtype), env.rank_label):
        run(flags, env, device, dtype)


def run(flags: EvaluateFlags, env: RankEnvironment, device: torch.device, dtype: torch.dtype) -> None:
    """Load the model, measure and report."""
    model, tokenizer_file = load_model(flags.checkpoint, dtype=dtype, device=device, tokenizer=flags.tokenizer)
    if flags.int8:
        quantize_int8(model)
    with contextlib.ExitStack() as stack:
        if flags.multiple_choice is not None:
            questions = read_questions(flags.multiple_choice)
            if env.world_size > 1:
                stack.enter_context(process_group(env, device))
            tokenizer = load_tokenizer(tokenizer_file)
            score = score_choices(model, tokenizer, questions, rank=env.rank, world_size=env.world_size)
            if env.is_first:
                report_choices(score, flags)
            return
        if flags.shards is None:
            reader = stack.enter_context(shards_of_texts(flags.text, tokenizer_file))
        else:
            reader = open_shards(flags.shards, flags.split)
        check_vocabulary(model, reader)
        if env.world_size > 1:
            stack.enter_context(process_group(env, device))
        result = measure(model, reader, flags, env)
    if env.is_first:
        report(result, flags, reader.fingerprint)


def remedies(flags: EvaluateFlags, dtype: torch.dtype) -> list[str]:
    """Flags that lower the memory of an evaluation."""
    found = ["pass --precision bf16"] if dtype == torch.float32 else []
    if flags.multiple_choice is not None:
        return [*found, f"shorten the questions of {flags.multiple_choice}"]
    if flags.micro_batch_size > 1:
        found.insert(0, f"lower --micro-batch-size {flags.micro_batch_size}")
    return [*found, f"shorten --seq-len {flags.seq_len}"]


def measure(model: MiniMindForCausalLM, reader: ShardReader, flags: EvaluateFlags, env: RankEnvironment) -> Evaluation:
    """`evaluate` with the settings of the flags. Every rank calls this."""
    return evaluate(
        model,
        open_dataset(reader, flags.seq_len, flags.document_mask, keep_tail=True),
        micro_batch_size=flags.micro_batch_size,
        max_samples=flags.max_samples,
        rank=env.rank,
        world_size=env.world_size,
    )


def report_choices(score: ChoiceScore, flags: EvaluateFlags) -> None:
    """Print the accuracies, and write them with the flags."""
    output = write_result(flags, asdict(score))
    print(f"accuracy        {score.accuracy:.4f}")
    print(f"length-normed   {score.accuracy_norm:.4f}")
    print(f"questions       {score.num_questions:,}")
    print(f"written to      {output}")


def report(result: Evaluation, flags: EvaluateFlags, fingerprint: str) -> None:
    """Print the figures, and write them with the flags and the data."""
    output = write_result(flags, {**asdict(result), "data_fingerprint": fingerprint})
    print(f"loss            {result.loss:.4f}")
    print(f"perplexity      {result.perplexity:.3f}")
    print(f"bits per byte   {result.bits_per_byte:.4f}")
    print(f"tokens          {result.num_targets:,} in {result.num_samples:,} windows of {flags.seq_len}")
    print(f"written to      {output}")


def write_result(flags: EvaluateFlags, values: dict[str, Any]) -> Path:
    """Write figures and flags as JSON; gives the file."""
    settings = {name: str(v) if isinstance(v, Path) else v for name, v in asdict(flags).items() if name != "output"}
    settings["text"] = [str(file) for file in flags.text]
    output = flags.output or output_folder(flags.checkpoint) / OUTPUT_NAME
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
