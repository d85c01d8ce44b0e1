"""Ask DeepSpeed's own parser whether a configuration is valid, before any rank starts."""

import copy
import logging
from collections.abc import Callable
from typing import Any

import torch
from deepspeed.ops.op_builder import AsyncIOBuilder
from deepspeed.runtime import lr_schedules
from deepspeed.runtime.config import DEEPSPEED_OPTIMIZERS, DeepSpeedConfig, DeepSpeedConfigError
from deepspeed.runtime.lr_schedules import VALID_LR_SCHEDULES
from deepspeed.runtime.precision_config import get_bfloat16_config, get_float16_config
from deepspeed.runtime.zero.config import get_zero_config
from deepspeed.runtime.zero.utils import ZERO_SUPPORTED_OPTIMIZERS
from torch import nn
from torch.utils import cpp_extension

from minimind.config.deepspeed_keys import offload_device
from minimind.errors import UserError, first_line
from minimind.schema import nearest


def check_ds_config(ds: dict[str, Any]) -> None:
    """Let DeepSpeed's own parsers read the configuration, before any process group is made.

    Raises:
        UserError: DeepSpeed refuses a key or a value, or has no optimizer or scheduler of that name and parameters.
    """
    for section, parse in (
        ("zero_optimization", get_zero_config),
        ("bf16", get_bfloat16_config),
        ("fp16", get_float16_config),
        ("", _parse_for_one_rank),
    ):
        try:
            parse(copy.deepcopy(ds))
        except (ValueError, TypeError, KeyError, AttributeError, AssertionError, DeepSpeedConfigError) as error:
            details: list[Any] = getattr(error, "errors", list)()  # pydantic's ValidationError is a ValueError
            reason = "; ".join(f"{'.'.join(map(str, item['loc']))}: {item['msg']}" for item in details)
            where = f"{section}: " if section else ""
            raise UserError(f"DeepSpeed config: {where}{reason or first_line(error)}") from None
    _try_optimizer(ds)


def check_ops(ds: dict[str, Any]) -> None:
    """Refuse what needs an op of DeepSpeed's that this machine cannot build.

    Raises:
        UserError: with what to install.
    """
    on_nvme = "nvme" in (offload_device(ds, "optimizer"), offload_device(ds, "param"))
    if on_nvme and not AsyncIOBuilder().is_compatible(verbose=False):
        raise UserError(
            "DeepSpeed config: offload to nvme needs DeepSpeed's async_io op, which cannot be built here; install "
            "libaio-dev, or offload to cpu"
        )
    if ds.get("compile", {}).get("deepcompile") and cpp_extension.CUDA_HOME is None:
        raise UserError("DeepSpeed config: compile.deepcompile needs the CUDA toolkit; set CUDA_HOME, or use --compile")


def _parse_for_one_rank(ds: dict[str, Any]) -> None:
    """The whole of DeepSpeed's parsing. Without a process group it takes the world for one rank."""
    ds["train_batch_size"] = ds["train_micro_batch_size_per_gpu"] * ds["gradient_accumulation_steps"]
    DeepSpeedConfig(ds)


def _try_optimizer(ds: dict[str, Any]) -> None:
    """Build the optimizer and the scheduler that the JSON names for one small parameter."""
    kind, params = ds["optimizer"]["type"], ds["optimizer"]["params"]
    optimizer: torch.optim.Optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(1))])
    if kind.lower() not in DEEPSPEED_OPTIMIZERS:  # DeepSpeed's own need compiled ops: tried when the engine is built
        build = getattr(torch.optim, kind, None)
        if not isinstance(build, type) or not issubclass(build, torch.optim.Optimizer):
            known = [*sorted(DEEPSPEED_OPTIMIZERS), *torch.optim.__all__]
            raise UserError(f"DeepSpeed config: optimizer.type: '{kind}' is unknown{nearest(kind, known)}")
        optimizer = _try("optimizer", kind, lambda: build([nn.Parameter(torch.zeros(1))], **params))
        if type(optimizer) not in ZERO_SUPPORTED_OPTIMIZERS and not ds.get("zero_allow_untested_optimizer"):
            raise UserError(
                f"DeepSpeed config: optimizer.type: {kind} is untested under ZeRO; allow it by "
                '"zero_allow_untested_optimizer": true, or use another'
            )
    if "scheduler" in ds:
        kind, params = ds["scheduler"]["type"], ds["scheduler"].get("params") or {}
        schedule = getattr(lr_schedules if kind in VALID_LR_SCHEDULES else torch.optim.lr_scheduler, kind, None)
        if not isinstance(schedule, type):
            raise UserError(
                f"DeepSpeed config: scheduler.type: '{kind}' is unknown{nearest(kind, VALID_LR_SCHEDULES)} "
                f"(DeepSpeed's: {', '.join(VALID_LR_SCHEDULES)})"
            )
        _try("scheduler", kind, lambda: schedule(optimizer, **params))


def _try(section: str, kind: str, build: Callable[[], Any]) -> Any:
    logging.disable(logging.WARNING)  # what DeepSpeed says of this one is said again of the real one
    try:
        return build()
    except (TypeError, ValueError, AssertionError) as error:
        raise UserError(f"DeepSpeed config: {section}.params of {kind}: {first_line(error)}") from None
    finally:
        logging.disable(logging.NOTSET)
