"""What "auto" means for ZeRO's communication: the settings that one machine wants otherwise than another.

Only where the JSON says "auto"; a value that is given stays, and a setting that is absent is DeepSpeed's default.
Does not import deepspeed.
"""

from typing import Any

from minimind.config.deepspeed_keys import AUTO, zero_stage

_BUCKET = {1: 200_000_000, 2: 200_000_000, 3: 50_000_000}
# Stage 2 fills its buckets in every micro-batch: what a processor reduces at once should be near its caches.
_BUCKET_ON_CPU = {**_BUCKET, 2: 20_000_000}


def settle_communication(ds: dict[str, Any], *, world_size: int, device_type: str, has_experts: bool) -> None:
    """Replace "auto" in `zero_optimization`, in place.

    | setting | GPU | CPU |
    |---|---|---|
    | `overlap_comm` | true | false: there is no second stream, only a second buffer |
    | `reduce_scatter` | true | false on a single rank without experts, where it copies every gradient once more |
    | `reduce_bucket_size` | 200,000,000 (stage 3: 50,000,000) | the same, but at stage 2 20,000,000 |

    No sum changes by any of them: with one rank there is nothing to sum, and the others only say when and how much.

    Args:
        world_size: data-parallel ranks.
        device_type: "cuda", "cpu"...
        has_experts: DeepSpeed reduces experts' gradients by reduce_scatter alone.
    """
    zero = ds.get("zero_optimization", {})
    on_cpu = device_type == "cpu"
    stage = zero_stage(ds)
    choices = {
        "overlap_comm": not on_cpu,
        "reduce_scatter": has_experts or world_size > 1 or not on_cpu,
        "reduce_bucket_size": (_BUCKET_ON_CPU if on_cpu else _BUCKET).get(stage, _BUCKET[1]),
    }
    for name, value in choices.items():
        if zero.get(name) == AUTO:
            zero[name] = value
