"""What ranks on simulated GPUs do for tests/simulated_cuda: functions of a module, so that they can be sent by name.

Imported by those ranks alone, which have the device.
"""

import contextlib
import dataclasses
import importlib
import io
import json
import os
import shutil
import signal
import socket
import threading
import unittest.mock
import urllib.request
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from simulated_device import Machine
from training_runs import train


def compute() -> dict[str, Any]:
    """Two steps of a linear layer on this process's accelerator and on the CPU, and what the former lacks."""
    from deepspeed.accelerator import get_accelerator

    device = torch.accelerator.current_accelerator(check_available=True)
    assert device is not None
    found: dict[str, Any] = {"accelerator": device.type, "deepspeed": get_accelerator().device_name()}
    for key, where in (("loss", device), ("loss of a cpu", torch.device("cpu"))):
        torch.manual_seed(0)
        layer, rows = torch.nn.Linear(8, 8).to(where), torch.randn(4, 8).to(where)
        optimizer = torch.optim.AdamW(layer.parameters(), lr=0.1, fused=True)
        for _ in range(2):
            optimizer.zero_grad()
            loss = layer(rows).square().mean()
            loss.backward()
            optimizer.step()
        found |= {key: loss.item(), f"{key} device": loss.device.type}
    torch.accelerator.synchronize()
    found["held"] = torch.accelerator.max_memory_allocated()
    tries: dict[str, Callable[[], Any]] = {
        "float64": lambda: torch.zeros(1, device=device).double(),
        "pinned memory": lambda: torch.zeros(1).pin_memory(),
        "a second stream": lambda: 1 / (torch.Stream(device).stream_id != torch.accelerator.current_stream().stream_id),
    }
    found["lacks"] = {}
    for what, attempt in tries.items():
        try:
            attempt()
        except (RuntimeError, TypeError, ZeroDivisionError) as error:
            found["lacks"][what] = type(error).__name__
    return found


def train_on(machine: Machine, flags: list[str], visible: str | None = None) -> tuple[int, str]:
    """`training_runs.train` on `machine`; afterwards the process has its own again."""
    from simulated_device.device_module import state, use

    before = state.machine
    use(machine, visible)
    try:
        return train(flags)
    finally:
        use(before)


def train_with_memory(memory: int, flags: list[str], kind: str = "H100") -> tuple[int, str]:
    """`training_runs.train` on devices of `memory` bytes, one a rank, and so for every process that it starts; an error
    is what is printed."""
    from minimind.errors import UserError

    machine = Machine(kind, devices=int(os.environ.get("WORLD_SIZE", "1")), memory=memory)
    try:
        with unittest.mock.patch.dict(os.environ, machine.variables()):
            return train_on(machine, flags)
    except UserError as error:
        return 1, str(error)


def train_seeing_one(flags: list[str]) -> tuple[int, str]:
    """Train on a rank that is shown the device of its own number alone."""
    visible = os.environ["LOCAL_RANK"]
    with unittest.mock.patch.dict(os.environ, CUDA_VISIBLE_DEVICES=visible):
        return train_on(Machine(devices=2), flags, visible)


def train_until_killed(step: str, *flags: str) -> None:
    """Train until the process kills itself in step `step`."""
    from minimind.training import trainer

    def die(*args: Any) -> None:
        if args[0].global_steps == int(step) - 1:
            os.kill(os.getpid(), signal.SIGKILL)
        return optimizer_step(*args)

    optimizer_step = trainer.optimizer_step
    with unittest.mock.patch.object(trainer, "optimizer_step", die):
        train(list(flags))


def resume(flags: list[str], run_dir: Path, step: int) -> tuple[int, str]:
    """Continue a run as if it had been killed after its checkpoint of `step`: the later ones are gone."""
    if torch.distributed.is_initialized():
        raise RuntimeError("a group was left")
    for folder in sorted((run_dir / "checkpoints").glob("step_*")):
        if int(folder.name[5:]) > step:
            shutil.rmtree(folder, ignore_errors=True)
    return train(flags)


def count_waits(flags: list[str], first: int, last: int) -> dict[str, Any]:
    """Train, and count in steps `first` to `last` (from 1): waits of the host by package and place."""
    from simulated_device.trace import trace

    from minimind.training.trainer import Trainer

    step, stack, counted = Trainer.train_step, contextlib.ExitStack(), []

    def train_step(trainer: Trainer, batches: Any) -> None:
        if trainer.state.step == first - 1:
            counted.append(stack.enter_context(trace()))
        elif trainer.state.step == last:
            stack.close()
        step(trainer, batches)

    with unittest.mock.patch.object(Trainer, "train_step", train_step):
        code, printed = train(flags)
    (found,) = counted
    return {
        "code": code,
        "printed": printed,
        "ours": found.of("minimind"),
        "deepspeed": found.of("deepspeed"),
        "all": {f"{place}: {kind}": number for (kind, place), number in found.waits.items()},
        "operators": found.operators,
        "collectives": found.collectives,
    }


def spoil_a_step(flags: list[str], number: int) -> tuple[str, bool]:
    """Train with NaN gradients in step `number`; what was printed, and whether that step left all weights alone."""
    from deepspeed.utils import safe_get_full_fp32_param

    from minimind.training.trainer import Trainer

    step, same = Trainer.train_step, []

    def weights(trainer: Trainer) -> list[torch.Tensor]:
        return [safe_get_full_fp32_param(one).cpu().clone() for one in trainer.engine.module.parameters()]

    def train_step(trainer: Trainer, batches: Any) -> None:
        if trainer.state.step != number - 1:
            return step(trainer, batches)
        before, backward = weights(trainer), trainer.engine.backward
        with unittest.mock.patch.object(trainer.engine, "backward", lambda loss: backward(loss * float("nan"))):
            step(trainer, batches)
        same.append(all(map(torch.equal, before, weights(trainer))))

    with unittest.mock.patch.object(Trainer, "train_step", train_step):
        code, printed = train(flags)
    assert code == 0, printed
    return printed, same == [True]


def compile_without_triton(flags: list[str]) -> str:
    """Train with --compile on where there is no Triton; the error, which is a person's to read."""
    from minimind.errors import UserError

    try:
        with unittest.mock.patch("importlib.util.find_spec", lambda name: None):
            train([*flags, "--compile", "on"])
    except UserError as error:
        return str(error)
    return "nothing was said"


MOMENTS = {
    "forward": "minimind.model.transformer:MiniMindForCausalLM.forward",
    "backward": "deepspeed:DeepSpeedEngine.backward",
    "optimizer": "minimind.training.trainer:optimizer_step",
    "evaluation": "minimind.training.trainer:measure_loss",
    "save": "minimind.training.trainer:engine_probe_loss",
}


def run_out_of_memory(moment: str, flags: list[str]) -> str:
    """Train with a device that is full from `moment` on; the error, which is a person's to read."""
    from simulated_device.device_module import device, use

    from minimind.errors import UserError

    module, _, path = MOMENTS[moment].partition(":")
    owner: Any = importlib.import_module(module)
    *outer, name = path.split(".")
    for part in outer:
        owner = getattr(owner, part)
    original: Callable[..., Any] = getattr(owner, name)

    def full(*args: Any, **kwargs: Any) -> Any:
        device.set_capacity(device.allocated(0)[0])
        return original(*args, **kwargs)

    try:
        with unittest.mock.patch.object(owner, name, full):
            train(flags)
    except UserError as error:
        return str(error)
    finally:
        use(Machine())
    return "nothing was said"


def run_command(name: str, *arguments: str) -> tuple[int, str]:
    """`python -m minimind.NAME` in this process: its exit code, and what it printed."""
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed):
        try:
            code = importlib.import_module(f"minimind.{name}").main(list(arguments)) or 0
        except SystemExit as end:
            code = int(end.code or 0)
    return code, printed.getvalue()


def use_export(folder: str, device: str) -> dict[str, str]:
    """Continue one text greedily in fp32 on `device`: from Python, by the command, and by the server."""
    import uvicorn

    import minimind

    prompt, options = "the", {"max_new_tokens": 8, "temperature": 0.0}
    loaded = minimind.load(folder, device=device, precision="fp32")
    flags = ["--checkpoint", folder, "--max-new-tokens", "8", "--temperature", "0"]
    flags += ["--device", device, "--precision", "fp32"]
    found = {
        "device": str(next(loaded.model.parameters()).device),
        "python": minimind.generate(loaded, prompt, **options),
        "command": run_command("generate", *flags, "--prompt", prompt)[1],
    }
    serve = uvicorn.Server.run

    def ask(server: uvicorn.Server, sockets: list[socket.socket]) -> None:
        thread = threading.Thread(target=serve, args=(server, sockets))
        thread.start()
        address = f"http://127.0.0.1:{sockets[0].getsockname()[1]}/v1/completions"
        body = json.dumps({"model": Path(folder).name, "prompt": prompt}).encode()
        with urllib.request.urlopen(
            urllib.request.Request(address, body, {"Content-Type": "application/json"})
        ) as answer:
            found["server"] = json.load(answer)["choices"][0]["text"]
        server.should_exit = True
        thread.join()

    with unittest.mock.patch.object(uvicorn.Server, "run", ask):
        run_command("serve", *flags, "--port", "0")
    return found


def evaluate_waits(run_dir: str, shards: str) -> dict[str, int]:
    """The waits of an evaluation by the command, by place and kind."""
    from simulated_device.trace import trace

    with trace() as counted:
        run_command("evaluate", "--checkpoint", run_dir, "--shards", shards, "--seq-len", "16", "--device", "cuda")
    return counted.of("minimind")


def generate_waits(run_dir: str, num_tokens: int) -> dict[str, int]:
    """The waits of a generation of `num_tokens` tokens, by place and kind."""
    from simulated_device.trace import trace

    from minimind.checkpoints.formats.load_model import load_model
    from minimind.inference.decoding import Row, decode
    from minimind.inference.sampling import GenerationOptions

    model = load_model(Path(run_dir), device="cuda")[0]
    row = Row([5, 6, 7], GenerationOptions(temperature=1.0, seed=0, max_new_tokens=num_tokens))
    with trace() as counted:
        for _ in decode(model, [row]):
            pass
    return counted.of("minimind")


def raise_out_of_order(how: str) -> str:
    """Use a tensor on a second stream in the wrong way `how`; what is said, or nothing."""
    side, ones = torch.cuda.Stream(), torch.ones(8, device="cuda")
    try:
        if how == "used without waiting":
            with torch.cuda.stream(side):
                ones * 2
        if how == "read back without waiting":
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                twice = ones * 2
            twice + 1
        if how == "freed while in use":
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                twice = ones * 2
            del ones
            torch.ones(8, device="cuda").add_(1)
        if how == "freed and recorded":
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                twice = ones * 2
            ones.record_stream(side)
            del ones
            torch.ones(8, device="cuda").add_(1)
        if how == "waited for":
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                twice = ones * 2
            torch.cuda.current_stream().wait_stream(side)
            twice + 1
    except RuntimeError as error:
        torch.cuda.synchronize()
        return str(error).splitlines()[0]
    return ""


def copy_early() -> tuple[list[float], bool, list[float], bool, list[float]]:
    """A copy to pinned memory, read before and after its event was asked."""
    figures = torch.empty(2).pin_memory()
    figures.copy_(torch.ones(2, device="cuda"), non_blocking=True)
    arrived = torch.cuda.Event()
    arrived.record()
    early, first, still, second = figures.tolist(), arrived.query(), figures.tolist(), arrived.query()
    return early, first, still, second, figures.tolist()


def decode_in_graphs(kernels: str, lengths: list[int], num_tokens: int, leave_after: int) -> dict[str, Any]:
    """Continue rows with prompts of `lengths` tokens greedily in fp32, the last of them ended after `leave_after`.

    Args:
        kernels: MINIMIND_KERNELS; "broken": a capture fails.
    """
    from minimind.inference.decoding import Row, decode
    from minimind.inference.sampling import GenerationOptions
    from minimind.model import PRESETS, MiniMindForCausalLM

    torch.manual_seed(0)
    config = dataclasses.replace(PRESETS["tiny"], vocab_size=300, initializer_range=0.2)
    model = MiniMindForCausalLM(config).eval().cuda()
    options = GenerationOptions(temperature=0.0, max_new_tokens=num_tokens)
    rows = [Row([7 + i, *range(3, 2 + length)], options) for i, length in enumerate(lengths)]
    forwards: list[int] = []
    forward = model.forward
    model.forward = lambda *args, **kwargs: (forwards.append(1), forward(*args, **kwargs))[1]  # type: ignore[method-assign]
    index_fill = torch.Tensor.index_fill_ if kernels != "broken" else None  # only a capture needs it
    with (
        unittest.mock.patch.dict(os.environ, MINIMIND_KERNELS="all" if kernels == "broken" else kernels),
        unittest.mock.patch.object(torch.Tensor, "index_fill_", index_fill or _refuse),
        warnings.catch_warnings(record=True) as said,
    ):
        warnings.simplefilter("always")
        for step, _ in enumerate(decode(model, rows), 1):
            if step == leave_after:
                rows[-1].reason = "stop"
    tokens = [row.new_tokens for row in rows]
    return {"tokens": tokens, "forwards": len(forwards), "said": [str(one.message) for one in said]}


def _refuse(*_: Any) -> None:
    raise RuntimeError("operation not permitted when stream is capturing")
