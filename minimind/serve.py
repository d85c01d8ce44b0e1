"""Serve a trained model through OpenAI's HTTP interface, with a chat page: the command.

    python -m minimind.serve --checkpoint RUN_OR_STEP_OR_EXPORT [--port 8000]

Needs the packages of requirements-serve.txt.
"""

import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from minimind.checkpoints.formats.load_model import load_model
from minimind.cli import parse_flags
from minimind.data.tokenizer import load_tokenizer
from minimind.distributed.out_of_memory import explain_out_of_memory
from minimind.errors import UserError, run_main
from minimind.inference.batching import Batcher
from minimind.inference.device import ModelFlags, choose_device
from minimind.inference.sampling import GenerationOptions
from minimind.model import MiniMindForCausalLM
from minimind.model.kernels.packed_weights import prepare_decoding
from minimind.schema import AT_LEAST_1, Limits

try:
    import uvicorn

    from minimind.inference.http_api import build_app
except ModuleNotFoundError as error:
    _missing: str | None = error.name
else:
    _missing = None

KEY_VARIABLE = "MINIMIND_API_KEY"


@dataclass(frozen=True, kw_only=True)
class ServeFlags(ModelFlags, GenerationOptions):
    """Serve a trained model: /v1/models, /v1/completions, /v1/chat/completions, and a chat page at /.

    The sampling flags are defaults; requests override them.
    """

    host: str = "127.0.0.1"
    """Address to listen on; 0.0.0.0: every one of this machine."""
    port: Annotated[int, Limits(at_least=0, at_most=65535)] = 8000
    """Port to listen on; 0: any free one."""
    name: str | None = None
    """The model's name [default: its folder's name]."""
    api_key_file: Path | None = None
    """File with a key that every request must send; or set the variable MINIMIND_API_KEY."""
    accept_weights: bool = False
    """Load the weights that a client with the key names (POST /collective_rpc): a rollout server of minimind.train."""
    max_batch_size: Annotated[int, AT_LEAST_1] = 8
    """Requests decoded together."""
    max_waiting: Annotated[int, AT_LEAST_1] = 64
    """Requests that may wait; more are refused (429)."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.stop_token_ids is not None:
            raise UserError("stop_token_ids has no effect on a server: clients send stop texts")


def main(args: Sequence[str] | None = None) -> None:
    """Run the server until it is interrupted."""
    flags = parse_flags(ServeFlags, args, prog="python -m minimind.serve")
    if _missing is not None:
        raise UserError(f"the package {_missing} is missing: pip install -r requirements-serve.txt")
    api_key = read_key(flags.api_key_file)
    if flags.accept_weights and api_key is None:
        raise UserError(f"accept_weights needs a key: give --api-key-file, or set {KEY_VARIABLE}")
    # oneDNN compiles for every prompt length, half a megabyte each, and by default keeps a thousand.
    for name in ("LRU_CACHE_CAPACITY", "ONEDNN_PRIMITIVE_CACHE_CAPACITY"):
        os.environ.setdefault(name, "16")
    device, dtype = choose_device(flags.device, flags.precision, int8=flags.int8)
    listener = listen(flags.host, flags.port)

    def load(path: Path) -> tuple[MiniMindForCausalLM, Path]:
        with explain_out_of_memory(device, ["take another --device, --precision bf16, or on a CPU --int8"]):
            model, tokenizer_file = load_model(path, dtype=dtype, device=device, tokenizer=flags.tokenizer)
            prepare_decoding(model, int8=flags.int8)
        return model, tokenizer_file

    model, tokenizer_file = load(flags.checkpoint)
    tokenizer = load_tokenizer(tokenizer_file)
    batcher = Batcher(model, tokenizer, max_batch_size=flags.max_batch_size, max_waiting=flags.max_waiting)
    name = flags.name or flags.checkpoint.resolve().name
    load_weights = (lambda path: load(path)[0]) if flags.accept_weights else None
    app = build_app(batcher, tokenizer, model_name=name, defaults=flags, api_key=api_key, load=load_weights)
    host, port = listener.getsockname()[:2]
    print(f"serving {name} at http://{host}:{port}/ (Ctrl-C ends it)", flush=True)
    try:
        uvicorn.Server(uvicorn.Config(app, log_level="warning", timeout_graceful_shutdown=5)).run([listener])
    finally:
        batcher.close()


def read_key(file: Path | None) -> str | None:
    """The API key from the file, or from the environment. Raises `UserError` for an unreadable or empty file."""
    if file is None:
        return os.environ.get(KEY_VARIABLE) or None
    try:
        key = file.read_text(encoding="utf-8").strip()
    except (OSError, ValueError) as error:
        raise UserError(f"api_key_file: {file} cannot be read: {error}") from None
    if not key:
        raise UserError(f"api_key_file: {file} is empty")
    return key


def listen(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the model is loaded: early clients wait instead of being refused.

    Raises:
        UserError: the address is in use or not available.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listener.bind((host, port))
        listener.listen()  # merely bound, a second server could bind it too, and fail only after loading
    except OSError as error:
        listener.close()
        raise UserError(
            f"host {host} port {port}: {error.strerror or error}; choose another --port or --host"
        ) from None
    return listener


if __name__ == "__main__":
    run_main(main)
