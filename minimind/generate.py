"""Generate text with a trained model, or chat: the command.

    python -m minimind.generate --checkpoint RUN_OR_STEP_OR_EXPORT --prompt TEXT
    python -m minimind.generate --checkpoint RUN_OR_STEP_OR_EXPORT          (chat in the terminal)

From Python: `minimind.generate` and `minimind.stream` (docs/en/python.md).
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

from minimind.checkpoints.formats.load_model import load_model, stretch_context
from minimind.cli import parse_flags
from minimind.config.run_config import Precision
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.errors import UserError, run_main
from minimind.inference.chat import Chat, converse, encode_question
from minimind.inference.device import choose_device
from minimind.inference.generation import Completion, GenerationOptions, Prompt, complete, stream_text
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.packed_weights import prepare_decoding


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(GenerationOptions):
    """Continue a prompt, or chat, with a trained model."""

    checkpoint: Path
    """A run's folder, one of its checkpoints, an exported folder, or a .pth."""
    tokenizer: Path | None = None
    """Tokenizer file or folder, if none is stored beside the weights."""
    prompt: tuple[str, ...] = ()
    """One or more texts to continue; without one, a chat begins."""
    chat: bool = False
    """Put each prompt into the chat format, as a question."""
    system: str = ""
    """The system message of a chat."""
    json: bool = False
    """Print one JSON object for each prompt instead of text as it comes."""
    precision: Precision | None = None
    """Arithmetic [default: bf16 on a GPU that has it, otherwise fp32]."""
    device: str | None = None
    """cpu, cuda, cuda:1 ... [default: a GPU if there is one]."""
    int8: bool = False
    """On a CPU: 8-bit weights with bf16 arithmetic, the fastest; slightly less exact."""
    compile: bool = False
    """Compile the model with torch.compile: a slow start, then faster."""
    rope_scaling_factor: float | None = None
    """Read up to this many times the trained context by YaRN."""
    rope_original_max_position_embeddings: int | None = None
    """YaRN: the sequence length of training [default: from the model's config]."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.rope_original_max_position_embeddings is not None and self.rope_scaling_factor is None:
            raise UserError("rope_original_max_position_embeddings has no effect without --rope-scaling-factor")
        if self.system and self.prompt and not self.chat:
            raise UserError("system has no effect on plain prompts: add --chat")
        if self.json and not self.prompt:
            raise UserError("json needs --prompt")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    args = sys.argv[1:] if args is None else args
    flags = parse_flags(GenerateFlags, args, default=tyro.MISSING_NONPROP, prog="python -m minimind.generate")
    device, dtype = choose_device(flags.device, flags.precision, int8=flags.int8)
    with explain_out_of_memory(device, memory_hints(flags, device, dtype)):
        run(flags, device, dtype)


def run(flags: GenerateFlags, device: torch.device, dtype: torch.dtype) -> None:
    """Load the model, and answer or chat."""
    model, tokenizer_file = load_model(flags.checkpoint, dtype=dtype, device=device, tokenizer=flags.tokenizer)
    prepare_decoding(model, int8=flags.int8, compiled=flags.compile)
    tokenizer = load_tokenizer(tokenizer_file)
    if flags.rope_scaling_factor is not None:
        stretch_context(model, flags.rope_scaling_factor, flags.rope_original_max_position_embeddings)
    if flags.compile:
        model.compile(dynamic=True)
    if not flags.prompt:
        chat_in_terminal(model, tokenizer, flags)
        return
    prompts: list[Prompt] = list(flags.prompt)
    if flags.chat:
        prompts = [encode_question(tokenizer, text, flags.system) for text in flags.prompt]
    if flags.json:
        print_completions(flags, complete(model, tokenizer, prompts, flags))
    elif len(prompts) == 1:
        for piece in stream_text(model, tokenizer, prompts[0], flags):
            print(piece, end="", flush=True)
        print()
    else:
        for text, completion in zip(flags.prompt, complete(model, tokenizer, prompts, flags), strict=True):
            print(f"--- {text}\n{completion.text}")


def memory_hints(flags: GenerateFlags, device: torch.device, dtype: torch.dtype) -> list[str]:
    """What lowers the memory that generation needs."""
    found = [] if flags.int8 or device.type != "cpu" else ["pass --int8"]
    if dtype == torch.float32 and device.type != "cpu":
        found.append("pass --precision bf16")
    if len(flags.prompt) > 1:
        found.append(f"give fewer than {len(flags.prompt)} prompts at once")
    found.append(f"lower --max-new-tokens {flags.max_new_tokens}")
    return found if device.type == "cpu" else [*found, "or pass --device cpu"]


def print_completions(flags: GenerateFlags, completions: Sequence[Completion]) -> None:
    """One JSON object a line."""
    for text, completion in zip(flags.prompt, completions, strict=True):
        print(json.dumps({"prompt": text, **dataclasses.asdict(completion)}, ensure_ascii=False))


def chat_in_terminal(model: MiniMindForCausalLM, tokenizer: Tokenizer, flags: GenerateFlags) -> None:
    """Chat until the user leaves; if the input is not a terminal, each of its lines is a message."""
    room = model.config.max_position_embeddings - flags.max_new_tokens
    chat = Chat(tokenizer, lambda prompt: stream_text(model, tokenizer, prompt, flags), room, flags.system)
    converse(chat, read_line, functools.partial(print, end="", flush=True))


def read_line() -> str:
    """The next line of standard input; a terminal gets a mark, a history and line editing."""
    if not sys.stdin.isatty():
        return input()
    import readline  # noqa: F401, PLC0415 - changes what input() does, and writes to the terminal when imported

    return input("> ")


if __name__ == "__main__":
    run_main(main)
