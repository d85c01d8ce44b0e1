"""A step of decoding as one CUDA graph: the host starts one thing a token instead of some hundred kernels.

All tensors of a graph keep their place and shape. So the newest token is read in the last column of the cache, always
the same, and copied from there to its own; attention looks at the whole cache, through a mask that grows. Refuses to
know of rows and sampling.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from minimind.accelerator import device_module, has_graphs
from minimind.inference.sampling import to_device
from minimind.model import KVCache, MiniMindForCausalLM
from minimind.model.kernels.apply import chosen_kernels


def fits_graph(model: MiniMindForCausalLM) -> bool:
    """Whether a step of this model is captured: on CUDA, not compiled, without experts, whose products ask the host how
    many rows they have where no kernel of torch fits, and without hooks, such as those by which ZeRO-3 gathers weights:
    they run on the host."""
    if not has_graphs(model.lm_head.weight.device) or "graphs" not in chosen_kernels():
        return False
    if any(module._forward_pre_hooks or module._forward_hooks for module in model.modules()):
        return False
    return not model.config.use_moe and model._compiled_call_impl is None


class GraphedStep:
    """Reads one token of every row, after those in `cache`, whose last column has to be free.

    Args:
        padding: columns before the first token of each row.

    Raises:
        RuntimeError: it cannot be captured; the cache is as before.
    """

    def __init__(self, model: MiniMindForCausalLM, cache: KVCache, padding: Sequence[int]) -> None:
        device, length = cache.keys.device, cache.length
        self._model, self._cache = model, cache
        starts, columns = to_device(padding, device, torch.long), torch.arange(cache.max_length, device=device)
        self._input_ids = torch.zeros(len(padding), 1, dtype=torch.long, device=device)
        self._mask = ((columns >= starts[:, None]) & (columns < length)).long()  # (B, max_length)
        self._positions = (length - starts)[:, None]  # (B, 1)
        self._column = torch.full((1,), length, device=device)
        self._module = device_module(device)
        self._graph = self._module.CUDAGraph()
        try:
            self._capture()
        finally:
            cache.length = length

    def __call__(self, tokens: Sequence[int]) -> Tensor:
        """Logits (B, V) after these tokens, one of each row; the next call overwrites them."""
        self._input_ids.copy_(to_device([[token] for token in tokens], self._input_ids.device, torch.long))
        self._graph.replay()
        self._cache.length += 1
        return self._logits

    def _capture(self) -> None:
        side = self._module.Stream()
        side.wait_stream(self._module.current_stream())
        try:
            with self._module.stream(side):
                self._read()  # libraries choose and allocate at their first call
                # Not by the module's `graph`, which also collects Python's garbage and empties the allocator's caches.
                self._graph.capture_begin(capture_error_mode="thread_local")
                try:
                    self._logits = self._read()
                    self._mask.index_fill_(1, self._column, 1)
                    self._positions.add_(1)
                    self._column.add_(1)
                finally:
                    self._graph.capture_end()
        finally:
            self._module.current_stream().wait_stream(side)

    def _read(self) -> Tensor:
        cache = self._cache
        cache.length = cache.max_length - 1
        logits = self._model(
            self._input_ids,
            position_ids=self._positions,
            attention_mask=self._mask,
            cache=cache,
            logits_to_keep=1,
        ).logits
        for tensor in (cache.keys, cache.values):
            tensor.index_copy_(3, self._column, tensor[..., -1:, :].clone())
        assert logits is not None  # there always are, without labels
        return logits[:, -1]
