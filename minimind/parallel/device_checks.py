"""DeepSpeed's optimizers on an accelerator, made to leave on the device what they read on the host.

DeepSpeed asks in each step whether the norm of the gradients is finite and above the limit, and orders its second
stream by waiting for the whole device. Here the answer stays on the device: clipping multiplies by a factor of at most
1, the update is told by AdamW's `found_inf` to change nothing, and streams wait for each other. The arithmetic of a
step is the same. Once, by exchanging the optimizer's class: its state, hooks and checkpoints stay as they are.
"""

import contextlib
from collections.abc import Callable, Iterator, Sequence
from types import ModuleType
from typing import Any

import torch
from deepspeed.accelerator import get_accelerator
from deepspeed.runtime import bf16_optimizer
from deepspeed.runtime import utils as deepspeed_utils
from deepspeed.runtime.bf16_optimizer import BF16_Optimizer
from deepspeed.runtime.zero import partition_parameters, stage3, stage_1_and_2
from deepspeed.runtime.zero.stage3 import DeepSpeedZeroOptimizer_Stage3
from deepspeed.runtime.zero.stage_1_and_2 import DeepSpeedZeroOptimizer
from torch import Tensor

from minimind.config.resolved_run import ResolvedRun


def leave_checks_on_device(optimizer: Any, resolved: ResolvedRun) -> None:
    """Let the optimizer of an engine on an accelerator take its steps without the host, where it can.

    Not with fp16, whose loss scale the host changes, not under offload, where the host updates, and not with an
    optimizer that has no `found_inf`.
    """
    kind = _KINDS.get(type(optimizer))
    is_own = resolved.train.optimizer == "adamw" and not resolved.zero.offloaded
    if kind is not None and is_own and resolved.train.precision != "fp16":
        optimizer.__class__ = kind
        if kind is DeviceStage3:
            _order_streams_alone(partition_parameters.NoGatherHandle)
            _order_streams_alone(partition_parameters.NoGatherCoalescedHandle)


@contextlib.contextmanager
def _exchanged(owner: Any, **values: Any) -> Iterator[None]:
    """Attributes of a module or object exchanged in the block."""
    before = {name: vars(owner)[name] for name in values if name in vars(owner)}
    for name, value in values.items():
        setattr(owner, name, value)
    try:
        yield
    finally:
        for name in values:
            if name in before:
                setattr(owner, name, before[name])
            else:
                delattr(owner, name)


@contextlib.contextmanager
def _checks_on_device(optimizer: Any, module: ModuleType, **others: Any) -> Iterator[None]:
    """A step in the block learns of `module`'s check that its norm is valid, and AdamW of the true answer."""

    def is_invalid(norm: Any) -> bool:
        if not isinstance(norm, Tensor):
            return _is_invalid(norm)
        optimizer.optimizer.found_inf = (~torch.isfinite(norm) | (norm < 0)).any().float()
        return False

    # Nothing is masked: NaN and infinity stay what they are, for the record of the step.
    unmasked: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with (
        _exchanged(module, is_invalid_grad_norm=is_invalid, **others),
        _exchanged(deepspeed_utils, mask_nan_or_inf_with_val_inplace=unmasked),
    ):
        yield


_is_invalid = deepspeed_utils.is_invalid_grad_norm


def _clip(input_tensors: Sequence[Tensor], max_norm: float, global_norm: Any, mpu: Any, eps: float = 1e-6) -> Any:
    """DeepSpeed's `clip_tensors_by_global_norm`, multiplying by 1 where it does nothing."""
    factor = max_norm / (global_norm + eps)
    factor = factor.clamp(max=1.0) if isinstance(factor, Tensor) else min(factor, 1.0)
    torch._foreach_mul_([tensor.detach() for tensor in input_tensors], factor)
    return global_norm


class DeviceBF16Optimizer(BF16_Optimizer):
    """Stage 1 in bf16."""

    def step(self, closure: Any = None) -> None:
        """As DeepSpeed's."""
        with _checks_on_device(self, bf16_optimizer, clip_tensors_by_global_norm=_clip):
            super().step(closure)


class DeviceStage1And2(DeepSpeedZeroOptimizer):
    """Stage 2, and stage 1 in other precisions."""

    def step(self, closure: Any = None) -> None:
        """As DeepSpeed's."""
        with _checks_on_device(self, stage_1_and_2, mask_nan_or_inf_with_val_inplace=lambda *_, **__: None):
            super().step(closure)

    def check_overflow(self, partition_gradients: bool = True) -> None:
        """Nothing: each gradient would be looked at alone, and the norm of all tells as much."""

    def allreduce_and_copy(self, *args: Any, **kwargs: Any) -> Any:
        """As DeepSpeed's."""
        with self._in_order():
            return super().allreduce_and_copy(*args, **kwargs)

    def _allreduce_noncontiguous_bucket_preserving_fp32(self, *args: Any, **kwargs: Any) -> Any:
        with self._in_order():
            return super()._allreduce_noncontiguous_bucket_preserving_fp32(*args, **kwargs)

    def independent_gradient_partition_epilogue(self) -> None:
        """As DeepSpeed's."""
        with self._in_order():
            super().independent_gradient_partition_epilogue()

    @contextlib.contextmanager
    def _in_order(self) -> Iterator[None]:
        """What asks for the device to be done in the block gets the two streams in order instead."""
        current, reduction = get_accelerator().current_stream(), self.reduction_stream

        def wait_for_each_other(*_: Any) -> None:
            current.wait_stream(reduction)
            reduction.wait_stream(current)

        with _exchanged(get_accelerator(), synchronize=wait_for_each_other):
            yield


class _FillingTorch:
    """torch to a module of DeepSpeed's, but that a tensor of a number is filled on the device, not copied to it."""

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)

    @staticmethod
    def tensor(value: float, **options: Any) -> Tensor:
        return torch.full((), value, **options)


class DeviceStage3(DeepSpeedZeroOptimizer_Stage3):
    """Stage 3."""

    def get_grad_norm_direct(self, *args: Any, **kwargs: Any) -> Tensor:
        """As DeepSpeed's."""
        with _exchanged(stage3, torch=_FillingTorch()):
            return super().get_grad_norm_direct(*args, **kwargs)

    def step(self, closure: Any = None) -> None:
        """As DeepSpeed's."""
        with _checks_on_device(self, stage3):
            super().step(closure)

    def _post_step(self, *args: Any, **kwargs: Any) -> None:
        # The weights that stay whole are gathered, and the stream waits for that already.
        with _exchanged(get_accelerator(), synchronize=lambda *_: None):
            super()._post_step(*args, **kwargs)

    def independent_gradient_partition_epilogue(self) -> None:
        """As DeepSpeed's."""
        stream = self.reduce_and_partition_stream
        with _exchanged(stream, synchronize=lambda: get_accelerator().current_stream().wait_stream(stream)):
            super().independent_gradient_partition_epilogue()


def _order_streams_alone(handle: type) -> None:
    """Let a weight that one rank holds whole be ready without the host: who has fetched it lets its stream wait for the
    one it was fetched on, as with weights that are gathered. Once for the process."""
    wait = handle.wait  # type: ignore[attr-defined]

    def wait_on_device(self: Any, **options: Any) -> None:
        with _exchanged(get_accelerator(), resolves_data_dependency=lambda: True):
            wait(self, **options)

    if wait.__module__ != __name__:
        handle.wait = wait_on_device  # type: ignore[attr-defined]


_KINDS: dict[type, type] = {
    BF16_Optimizer: DeviceBF16Optimizer,
    DeepSpeedZeroOptimizer: DeviceStage1And2,
    DeepSpeedZeroOptimizer_Stage3: DeviceStage3,
}
