"""Map the parameters of DeepSpeed's expert layers to parts of the model's tensors, on every rank.

In a plain model the names of a MoE layer are `model.layers.N.mlp.` followed by `gate.weight`
(E, hidden_size), `experts.gate_up_proj` (E, 2 * I, hidden_size; gate first), `experts.down_proj` (E, hidden_size, I),
`shared_experts.*`, `e_score_correction_bias` (E,). The engines' own layers hold the same numbers as:

| AutoEP | deepspeed.moe | part of |
|---|---|---|
| `router.gate.weight` | `moe.deepspeed_moe.gate.wg.weight` | `gate.weight` |
| `router.e_score_correction_bias` | | `e_score_correction_bias` |
| `experts.w1` (E_local, I, hidden_size) | `...deepspeed_experts.M.gate_proj.weight` | first half of `gate_up_proj` |
| `experts.w3` (E_local, I, hidden_size) | `...deepspeed_experts.M.up_proj.weight` | second half of it |
| `experts.w2` (E_local, hidden_size, I) | `...deepspeed_experts.M.down_proj.weight` | `down_proj` |

A rank of place r in its group of `ep_size` neighbours (r = rank % ep_size) holds the experts from r * E_local on, with
E_local = E / ep_size; M counts from 0 on each rank.

What DeepSpeed writes of them, beside what it writes of a dense model:
- `layer_L_expert_X_mp_rank_00_model_states.pt` (stages 0 to 2): expert X, counted over all ranks, of the L-th MoE layer
  (dense layers are not counted). AutoEP: `...experts.w1.X` and so on, two dimensions each. deepspeed.moe: the names
  above with X for M. The other model states lack those names.
- `expp_rank_R_mp_rank_00_optim_states.pt` (stage 0): the optimizer's state of the ranks of place R. The groups that it
  numbers are named in our client state, alike for every place.
- `zero_pp_rank_N_...` (stages 1 to 3): rank N's partitions. A group of experts (`moe` in its settings, named
  `ep_size_N`) is cut over the ranks that hold the same experts (those of equal rank % ep_size), other groups over all.
- Under stage 3 there are no files of experts: their weights are in the `zero_pp_rank_N` files alone.

Where tensor groups share matrices (`tp_size`), each rank R of a group has files of its own, `mp_rank_R` in the names
above, with its part of every matrix of `config.tensor_parallel` and all of the rest; experts then lie over all ranks.

Works without DeepSpeed. See also `config.expert_parallel`, `parallel.experts` and `checkpoints.consolidate`.
"""

import functools
import re
from collections.abc import Sequence
from dataclasses import dataclass

from minimind.config.tensor_parallel import cut_dimension
from minimind.model.config import ModelConfig
from minimind.model.tuning import parameter_shapes

_LAYER = re.compile(r"(model\.layers\.\d+\.mlp\.)(.+)")
_NATIVE_EXPERT = re.compile(r"moe\.deepspeed_moe\.experts\.deepspeed_experts\.(\d+)\.(gate|up|down)_proj\.weight")
_PLAIN = {
    "router.gate.weight": "gate.weight",
    "router.e_score_correction_bias": "e_score_correction_bias",
    "moe.deepspeed_moe.gate.wg.weight": "gate.weight",
}
_AUTOEP_EXPERTS = {"experts.w1": "gate", "experts.w2": "down", "experts.w3": "up"}


@dataclass(frozen=True)
class EnginePart:
    """A part of one of the model's tensors."""

    name: str
    """MiniMind's name of the whole tensor."""
    index: tuple[int | slice, ...]
    """`whole[index]` is the part; empty: all of it."""


def find_part(
    name: str, config: ModelConfig, ep_size: int = 1, ep_rank: int = 0, *, tp_size: int = 1, tp_rank: int = 0
) -> EnginePart:
    """What an engine's parameter or buffer `name` is, on the ranks of place `ep_rank` in their groups of `ep_size`, and
    `tp_rank` in their tensor groups of `tp_size`.

    A name that no backend has changed stands for itself.
    """
    if tp_size > 1 and (dimension := cut_dimension(name)) is not None:
        return EnginePart(name, own_index(_shapes(config)[name], dimension, tp_size, tp_rank))
    match = _LAYER.fullmatch(name)
    if match is None:
        return EnginePart(name, ())
    prefix, rest = match[1], match[2]
    if rest in _PLAIN:
        return EnginePart(prefix + _PLAIN[rest], ())
    num_local = config.num_experts // ep_size
    first = ep_rank * num_local
    if rest in _AUTOEP_EXPERTS:
        return _expert_part(prefix, _AUTOEP_EXPERTS[rest], slice(first, first + num_local), config)
    if native := _NATIVE_EXPERT.fullmatch(rest):
        return _expert_part(prefix, native[2], first + int(native[1]), config)
    return EnginePart(name, ())


def own_index(shape: Sequence[int], dimension: int, tp_size: int, tp_rank: int) -> tuple[slice, ...]:
    """What the rank of this place in its tensor group has of a whole parameter, cut into equal parts."""
    width = shape[dimension] // tp_size
    own = slice(tp_rank * width, (tp_rank + 1) * width)
    return (own,) if dimension == 0 else (slice(0, shape[0]), own)


_shapes = functools.lru_cache(maxsize=4)(parameter_shapes)


def _expert_part(prefix: str, matrix: str, experts: int | slice, config: ModelConfig) -> EnginePart:
    size = config.expert_feed_forward_size
    if matrix == "down":
        return EnginePart(f"{prefix}experts.down_proj", (experts,))
    rows = slice(0, size) if matrix == "gate" else slice(size, 2 * size)
    return EnginePart(f"{prefix}experts.gate_up_proj", (experts, rows))
