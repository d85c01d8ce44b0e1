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
from typing import Any

import torch

from minimind.checkpoints.formats.load_model import load_model, stretch_context
from minimind.cli import parse_flags
from minimind.data.tokenizer import Tokenizer, load_tokenizer
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.errors import UserError, run_main
from minimind.files import read_json
from minimind.inference.answer_reader import read_message
from minimind.inference.chat import Chat, converse, encode_question
from minimind.inference.device import ModelFlags, choose_device
from minimind.inference.generation import Prompt, complete, stream_text
from minimind.inference.sampling import GenerationOptions
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.packed_weights import prepare_decoding


@dataclass(frozen=True, kw_only=True)
class GenerateFlags(ModelFlags, GenerationOptions):
    """Continue a prompt, or chat, with a trained model."""

    prompt: tuple[str, ...] = ()
    """One or more texts to continue; without one, a chat begins."""
    chat: bool = False
    """Put each prompt into the chat format, as a question."""
    system: str = ""
    """The system message of a chat."""
    tools: Path | None = None
    """JSON file with the functions that the model of a chat may call, a list in OpenAI's form."""
    thinking: bool | None = None
    """Whether the model of a chat thinks first, where its chat template can choose; None: as the template has it."""
    json: bool = False
    """Print one JSON object for each prompt instead of text as it comes; of a chat with the answer as a message."""
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
        for name in ("system", "tools", "thinking"):
            if getattr(self, name) not in ("", None) and self.prompt and not self.chat:
                raise UserError(f"{name} has no effect on plain prompts: add --chat")
        if self.json and not self.prompt:
            raise UserError("json needs --prompt")


def main(args: Sequence[str] | None = None) -> None:
    """Run the command."""
    flags = parse_flags(GenerateFlags, args, prog="python -m minimind.generate")
    device, dtype = choose_device(flags.device, flags.precision, int8=flags.int8)
    with explain_out_of_memory(device, memory_hints(flags, device, dtype)):
        run(flags, device, dtype)


def run(flags: GenerateFlags, device: torch.device, dtype: torch.dtype) -> None:
    """Load the model, and answer or chat."""
    tools = None if flags.tools is None else read_tools(flags.tools)
    model, tokenizer_file = load_model(flags.checkpoint, dtype=dtype, device=device, tokenizer=flags.tokenizer)
    prepare_decoding(model, int8=flags.int8, compiled=flags.compile)
    tokenizer = load_tokenizer(tokenizer_file)
    if flags.rope_scaling_factor is not None:
        stretch_context(model, flags.rope_scaling_factor, flags.rope_original_max_position_embeddings)
    if flags.compile:
        model.compile(dynamic=True)
    if not flags.prompt:
        chat_in_terminal(model, tokenizer, flags, tools)
        return
    prompts: list[Prompt] = list(flags.prompt)
    if flags.chat:
        prompts = [encode_question(tokenizer, text, flags.system, tools, flags.thinking) for text in flags.prompt]
    if len(prompts) == 1 and not flags.json:
        for piece in stream_text(model, tokenizer, prompts[0], flags):
            print(piece, end="", flush=True)
        print()
        return
    completions = complete(model, tokenizer, prompts, flags)
    for text, prompt, completion in zip(flags.prompt, prompts, completions, strict=True):
        if flags.json:
            found = {"prompt": text, **dataclasses.asdict(completion)}
            if not isinstance(prompt, str):
                found["message"] = read_message(tokenizer, prompt, tools, completion.text)
            print(json.dumps(found, ensure_ascii=False))
        else:
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


def read_tools(file: Path) -> list[Any]:
    """The functions in a JSON file. Raises `UserError` where it holds another thing."""
    tools = read_json(file, "tools")
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise UserError(f"tools {file}: not a list of objects, each a function in OpenAI's form")
    return tools


def chat_in_terminal(model: MiniMindForCausalLM, tokenizer: Tokenizer, flags: GenerateFlags, tools: Any) -> None:
    """Chat until the user leaves; if the input is not a terminal, each of its lines is a message."""
    room = model.config.max_position_embeddings - flags.max_new_tokens
    chat = Chat(tokenizer, lambda prompt: stream_text(model, tokenizer, prompt, flags), room)
    chat.system, chat.tools, chat.thinking = flags.system, tools, flags.thinking
    converse(chat, read_line, functools.partial(print, end="", flush=True))


def read_line() -> str:
    """The next line of standard input; a terminal gets a mark, a history and line editing."""
    if not sys.stdin.isatty():
        return input()
    import readline  # noqa: F401, PLC0415 - changes what input() does, and writes to the terminal when imported

    return input("> ")


if __name__ == "__main__":
    run_main(main)
