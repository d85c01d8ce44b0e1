"""LoRA's adapters in the files of Hugging Face's PEFT, which transformers and vLLM load on the exported base."""

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from minimind.checkpoints.formats.huggingface_config import choose_architecture
from minimind.checkpoints.formats.layout import LAYOUTS, FilePart, cut_part, lay_out
from minimind.checkpoints.formats.source import Adapters, ModelSource
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.tuning import adapters_of

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def require_adapters(source: ModelSource) -> Adapters:
    """The adapters of `source`. Raises `UserError` where it has none."""
    if source.adapters is None:
        raise UserError(f"format: {source.where} holds no adapters, so there is nothing for peft; use --format hf")
    return source.adapters


def adapter_config(config: ModelConfig, adapters: Adapters) -> dict[str, Any]:
    """The content of adapter_config.json."""
    lora = adapters.lora
    modules = [name.removesuffix(".weight") for name, _ in _adapted(config, adapters)]
    # By their ends where that names them alone; a layer of experts has routed ones of the same names.
    short = sorted({name.rpartition(".")[2] for name in modules})
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(adapters.base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": modules if config.use_moe else short,
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def adapter_tensors(config: ModelConfig, adapters: Adapters) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors, by PEFT's names.

    Raises:
        UserError: the architecture of transformers cuts an adapted matrix into several.
    """
    tensors: dict[str, Tensor] = {}
    for name, part in _adapted(config, adapters):
        first, second = map(adapters.read, adapters_of(name))
        if part.rotary_pairs:  # rows in another order there
            own = FilePart(part.name, tuple(second.shape), part.own, rotary_pairs=part.rotary_pairs)
            second = cut_part(own, {part.own: second}.__getitem__)
        module = _PREFIX + part.name.removesuffix("weight")
        tensors |= {f"{module}lora_A.weight": first, f"{module}lora_B.weight": second}
    return tensors


def _adapted(config: ModelConfig, adapters: Adapters) -> Iterator[tuple[str, FilePart]]:
    """Each adapted matrix, by our name, and what it is in the exported base."""
    kind = choose_architecture(config)
    for part in lay_out(config, LAYOUTS.get(kind, "per_expert")):
        if part.own is not None and adapters.lora.has(part.own):
            if part.index:
                raise UserError(
                    f"format: {kind} of transformers cuts {part.own} in several; export it merged, --format hf"
                )
            yield part.own, part
