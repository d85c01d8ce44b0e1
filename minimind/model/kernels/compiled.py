"""What torch.compile fuses in training: norms, rotation, SwiGLU, residuals and casts, each a pass over memory of its
own, become a few kernels between the products, and the loss reads its logits twice.

Applied like the other kernels, after them: a module exchanges its class for a subclass. What a module's own hooks do
(gathering under ZeRO-3, recomputation) stays outside of what is compiled.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from minimind.errors import UserError, first_line
from minimind.model.loss import LMHead


@dataclass(frozen=True)
class Compiler:
    """Compiles functions at their first call."""

    say: Callable[[str], None]
    """Gets a line about each, with the seconds that it took."""
    required: bool
    """What cannot be compiled is an error; otherwise it is said, and runs as it is."""

    def compile(self, name: str, function: Callable[..., Any], plain: Callable[..., Any]) -> Callable[..., Any]:
        """`function`, compiled; `plain` does the same and takes its place where that fails."""
        traced, run = torch.compile(function), None

        def first(*inputs: Any) -> Any:
            nonlocal run
            began = time.monotonic()
            try:
                outputs = traced(*inputs)
            except Exception as error:
                # From the compiler, and not from what is compiled, such as a device that is full.
                if not type(error).__module__.startswith(("torch._inductor", "torch._dynamo")):
                    raise
                reason = first_line(getattr(error, "inner_exception", error))
                if self.required:
                    raise UserError(f"--compile on: {name}: {reason}; install what is missing") from error
                self.say(f"not compiled: {name}: {reason}")
                run = plain
                return plain(*inputs)
            run = traced
            self.say(f"compiled {name} in {time.monotonic() - began:.1f} s")
            return outputs

        return lambda *inputs: (run or first)(*inputs)

    def apply(self, name: str, modules: Sequence[nn.Module]) -> None:
        """Compile the training forward of `modules`, once for all of one class.

        Evaluation and decoding run as they are: their shapes would compile anew, for a few batches.
        """
        for kind in dict.fromkeys(map(type, modules)):
            alike = [module for module in modules if type(module) is kind]
            compiled = self._compiled_kind(kind, f"{len(alike)} {name}, one for all,")
            for module in alike:
                module.__class__ = compiled

    def _compiled_kind(self, kind: type[nn.Module], name: str) -> type[nn.Module]:
        # The class's function, and not each module's: the weights are arguments of what is compiled.
        run = self.compile(name, kind.forward, kind.forward)

        class Compiled(kind):  # type: ignore[valid-type, misc]
            def forward(self, *inputs: Any) -> Any:
                is_trained = self.training and torch.is_grad_enabled()
                return run(self, *inputs) if is_trained else kind.forward(self, *inputs)

        Compiled.__name__ = Compiled.__qualname__ = f"Compiled{kind.__name__}"
        return Compiled

    def apply_to_loss(self, head: LMHead) -> None:
        """Compile the loss of a chunk of logits, with its gradient."""
        kind = type(head)
        run = self.compile("the loss", fused_chunk_loss, kind.chunk_loss)

        class Compiled(kind):  # type: ignore[valid-type, misc]
            @staticmethod
            def chunk_loss(
                logits: Tensor, targets: Tensor, counts: Tensor, z_loss_coef: float, need_grad: bool
            ) -> tuple[Tensor, Tensor | None]:
                if not need_grad:
                    return kind.chunk_loss(logits, targets, counts, z_loss_coef, need_grad)
                for tensor in (logits, targets, counts):  # the last chunk is shorter
                    torch._dynamo.maybe_mark_dynamic(tensor, 0)
                return run(logits, targets, counts, z_loss_coef, need_grad)

        head.__class__ = Compiled


def fused_chunk_loss(
    logits: Tensor, targets: Tensor, counts: Tensor, z_loss_coef: float, need_grad: bool
) -> tuple[Tensor, Tensor | None]:
    """`LMHead.chunk_loss` without a step that a compiler cannot fuse (a scatter): one pass over the logits for their
    maximum and sum, one that reads them again and writes the gradient. No float32 copy of them is made."""
    targets = targets.unsqueeze(1)  # (n, 1)
    counted = counts.unsqueeze(1)
    wide = logits.float()
    log_partition = wide.logsumexp(dim=-1, keepdim=True)  # (n, 1)
    losses = log_partition - logits.gather(1, targets.clamp(min=0)).float()
    if z_loss_coef:
        losses = losses + z_loss_coef * log_partition.square()
    grad = (wide - log_partition).exp()
    if z_loss_coef:
        grad = grad * (1 + 2 * z_loss_coef * log_partition)
    is_target = torch.arange(logits.shape[1], device=logits.device) == targets  # (n, vocab_size)
    return losses * counted, ((grad - is_target.float()) * counted).to(logits.dtype)
