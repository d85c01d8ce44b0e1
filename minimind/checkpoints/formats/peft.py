"""LoRA's adapters in the files of Hugging Face's PEFT, which transformers and vLLM load on the exported base."""

from typing import Any

from torch import Tensor

from minimind.checkpoints.formats.source import Adapters, ModelSource
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.tuning import adapters_of, parameter_shapes

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_PREFIX = "base_model.model."


def require_adapters(source: ModelSource) -> Adapters:
    """The adapters of `source`. Raises `UserError` where it has none, or PEFT would compute something else."""
    if source.adapters is None:
        raise UserError(f"format: {source.where} holds no adapters, so there is nothing for peft; use --format hf")
    if source.config.use_moe:
        raise UserError(
            f"format: {source.where} has experts, whose matrices peft joins in its own way and then computes something "
            "else; export it merged, --format hf"
        )
    return source.adapters


def adapter_config(config: ModelConfig, adapters: Adapters) -> dict[str, Any]:
    """The content of adapter_config.json."""
    lora = adapters.lora
    modules = [name.removesuffix(".weight") for name in parameter_shapes(config) if lora.has(name)]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": str(adapters.base),
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": sorted({name.rpartition(".")[2] for name in modules}),
        "inference_mode": True,
        "fan_in_fan_out": False,
        "init_lora_weights": True,
    }


def adapter_tensors(config: ModelConfig, adapters: Adapters) -> dict[str, Tensor]:
    """The content of adapter_model.safetensors, by PEFT's names."""
    tensors: dict[str, Tensor] = {}
    for name in filter(adapters.lora.has, parameter_shapes(config)):
        first, second = map(adapters.read, adapters_of(name))
        module = _PREFIX + name.removesuffix("weight")
        tensors |= {f"{module}lora_A.weight": first, f"{module}lora_B.weight": second}
    return tensors
