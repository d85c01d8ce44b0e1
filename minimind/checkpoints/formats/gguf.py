"""Write a model as GGUF, the one file that llama.cpp loads as it is: weights, sizes and the tokenizer.

llama.cpp's own converter cannot be told that this project's tokenizers put no blank before a text.
"""

import json
import math
import struct
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import sentencepiece
import torch
from torch import Tensor

from minimind.checkpoints.formats.huggingface_config import choose_architecture
from minimind.data.tokenizer import CONTENT_MARKS
from minimind.errors import UserError
from minimind.model.config import ModelConfig
from minimind.model.rope import attention_factor, inverse_frequencies

_TENSOR_TYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 30}
_NORMAL, _UNKNOWN, _CONTROL, _USER_DEFINED, _UNUSED, _BYTE = range(1, 7)  # kinds of tokens
_ALIGNMENT = 32


def choose_gguf_architecture(config: ModelConfig) -> str:
    """What llama.cpp calls the architecture that computes this model.

    Raises:
        UserError: there is none; the message says why.
    """
    kind = choose_architecture(config)
    for holds, what in (
        (kind not in ("llama", "qwen2", "qwen3", "qwen3_moe"), f"an architecture of kind {kind}"),
        (kind == "qwen3_moe" and not config.norm_topk_prob, "norm_topk_prob=false"),
        (kind == "qwen3_moe" and config.first_k_dense_replace, f"first_k_dense_replace={config.first_k_dense_replace}"),
        (kind != "llama" and _has_factors(config), f"rope_scaling_type={config.rope_scaling_type!r} in {kind}"),
    ):
        if holds:
            raise UserError(f"GGUF is not written for {what}; use --format hf and llama.cpp's own converter")
    return kind.replace("_", "")


def _has_factors(config: ModelConfig) -> bool:
    return config.rope_scaling_factor != 1 and config.rope_scaling_type == "llama3"


def rope_factors(config: ModelConfig) -> dict[str, Tensor]:
    """By its name, what each rotary frequency is divided by, (head_size / 2,) float32; nothing without Llama 3's."""
    if not _has_factors(config):
        return {}
    exponents = torch.arange(0, config.head_size, 2, dtype=torch.float64) / config.head_size
    return {"rope_freqs.weight": (config.rope_theta**-exponents / inverse_frequencies(config)).float()}


def model_fields(config: ModelConfig) -> dict[str, Any]:
    """The metadata of the model itself. Raises `UserError` as `choose_gguf_architecture`."""
    kind = choose_gguf_architecture(config)
    fields: dict[str, Any] = {
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "block_count": config.num_hidden_layers,
        "feed_forward_length": config.feed_forward_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.key_length": config.head_size,
        "attention.value_length": config.head_size,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.dimension_count": config.head_size,
        "rope.freq_base": config.rope_theta,
        "vocab_size": config.vocab_size,
    }
    if config.use_moe:
        fields |= {
            "expert_count": config.num_experts,
            "expert_used_count": config.num_experts_per_tok,
            "expert_feed_forward_length": config.expert_feed_forward_size,
        }
    if config.rope_scaling_factor != 1 and not _has_factors(config):
        usual = 0.1 * math.log(config.rope_scaling_factor) + 1  # which llama.cpp applies by itself
        fields |= {
            "rope.scaling.type": config.rope_scaling_type,
            "rope.scaling.factor": config.rope_scaling_factor,
            "rope.scaling.original_context_length": config.trained_length,
        }
        if config.rope_scaling_type == "yarn":
            fields |= {
                "rope.scaling.yarn_attn_factor": attention_factor(config) / usual,
                "rope.scaling.yarn_beta_fast": config.rope_beta_fast,
                "rope.scaling.yarn_beta_slow": config.rope_beta_slow,
            }
    general = {"general.architecture": kind, "general.name": "minimind"}
    return general | {f"{kind}.{name}": value for name, value in fields.items()}


def tokenizer_fields(
    file: Path, settings: Mapping[str, Any], special_ids: Mapping[str, int], vocab_size: int
) -> dict[str, Any]:
    """The metadata of the tokenizer in `file`, its tokens filled up to the `vocab_size` of the model.

    Args:
        settings: of its tokenizer_config.json for transformers.

    Raises:
        UserError: llama.cpp does not cut texts as this tokenizer does.
    """
    fields = _sentencepiece_fields(file) if file.suffix == ".model" else _byte_level_fields(file)
    missing = range(len(fields["tokens"]), vocab_size)
    fields["tokens"] += [f"[PAD{i}]" for i in missing]
    fields["token_type"] = np.array(fields["token_type"] + [_UNUSED] * len(missing), np.int32)
    if "scores" in fields:
        fields["scores"] = np.array(fields["scores"] + [-10000.0] * len(missing), np.float32)
    names = {"bos_token": "bos_token_id", "eos_token": "eos_token_id", "pad_token": "padding_token_id"}
    fields |= {ours: special_ids[settings[theirs]] for theirs, ours in names.items() if theirs in settings}
    fields |= dict.fromkeys(("add_bos_token", "add_eos_token", "add_space_prefix"), False)
    template = {"tokenizer.chat_template": settings["chat_template"]} if "chat_template" in settings else {}
    return {f"tokenizer.ggml.{name}": value for name, value in fields.items()} | template


def _sentencepiece_fields(file: Path) -> dict[str, Any]:
    model = sentencepiece.SentencePieceProcessor(model_file=str(file))
    ids = range(model.vocab_size())
    marks = [i for i in ids if model.is_control(i) and model.id_to_piece(i) in CONTENT_MARKS]
    kinds = (
        (model.is_byte, _BYTE),
        (marks.__contains__, _USER_DEFINED),
        (model.is_control, _CONTROL),
        (model.is_unknown, _UNKNOWN),
    )
    return {
        "model": "llama",
        "pre": "default",
        "tokens": [model.id_to_piece(i) for i in ids],
        "scores": [model.get_score(i) for i in ids],
        "token_type": [next((kind for holds, kind in kinds if holds(i)), _NORMAL) for i in ids],
    }


def _byte_level_fields(file: Path) -> dict[str, Any]:
    content = json.loads(file.read_text(encoding="utf-8"))
    cut, model = content.get("pre_tokenizer") or {}, content["model"]
    is_gpt2 = cut.get("type") == "ByteLevel" and cut.get("use_regex", True) and not cut.get("add_prefix_space")
    if not is_gpt2 or content.get("normalizer") or model.get("type") != "BPE" or model.get("ignore_merges"):
        raise UserError(f"{file}: GGUF is written for byte-level BPE that cuts texts as GPT-2's; use --format hf")
    added = {token["id"]: token["content"] for token in content.get("added_tokens", ())}
    kinds = {token["id"]: _CONTROL if token["special"] else _USER_DEFINED for token in content.get("added_tokens", ())}
    pieces = {token_id: piece for piece, token_id in model["vocab"].items()} | added
    ids = range(max(pieces) + 1)
    return {
        "model": "gpt2",
        "pre": "gpt-2",
        "tokens": [pieces.get(i, f"[PAD{i}]") for i in ids],
        "token_type": [kinds.get(i, _NORMAL if i in pieces else _UNUSED) for i in ids],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
    }


def write_gguf(
    path: Path,
    fields: Mapping[str, Any],
    shapes: Mapping[str, tuple[int, ...]],
    dtypes: Mapping[str, torch.dtype],
    read: Callable[[str], Tensor],
) -> None:
    """Write metadata and the tensors `read(name)`, one in memory at a time. Not atomic.

    Raises:
        OSError: the disk is full, or the file cannot be written.
    """
    header = b"GGUF" + struct.pack("<IQQ", 3, len(shapes), len(fields))
    header += b"".join(_string(name) + _value(value) for name, value in fields.items())
    offset = 0
    for name, shape in shapes.items():
        sizes = struct.pack(f"<I{len(shape)}Q", len(shape), *reversed(shape))
        header += _string(name) + sizes + struct.pack("<IQ", _TENSOR_TYPES[dtypes[name]], offset)
        size = math.prod(shape) * dtypes[name].itemsize
        offset += size + -size % _ALIGNMENT
    with open(path, "wb") as file:
        file.write(header + bytes(-len(header) % _ALIGNMENT))
        for name in shapes:
            data = read(name).contiguous().view(torch.uint8).numpy().data
            file.write(data)
            file.write(bytes(-data.nbytes % _ALIGNMENT))


def _string(text: str) -> bytes:
    data = text.encode()
    return struct.pack("<Q", len(data)) + data


def _value(value: Any) -> bytes:
    """A type's number and a value of it."""
    if isinstance(value, np.ndarray):
        return struct.pack("<IIQ", 9, 5 if value.dtype == np.int32 else 6, len(value)) + value.tobytes()
    if isinstance(value, list):
        return struct.pack("<IIQ", 9, 8, len(value)) + b"".join(map(_string, value))
    if isinstance(value, str):
        return struct.pack("<I", 8) + _string(value)
    number, form = {bool: (7, "?"), int: (4, "I"), float: (6, "f")}[type(value)]
    return struct.pack(f"<I{form}", number, value)
