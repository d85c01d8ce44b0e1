"""Write a trained model for other programs: Hugging Face folder, our own folder, or MiniMind's `.pth`."""

import functools
import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm

from minimind.checkpoints.folder import checkpoint_name, checkpoints_folder
from minimind.checkpoints.formats import peft
from minimind.checkpoints.formats.gguf import (
    model_fields,
    rope_factors,
    tokenizer_fields,
    write_gguf,
)
from minimind.checkpoints.formats.huggingface_config import choose_architecture, to_huggingface
from minimind.checkpoints.formats.huggingface_tokenizer import cuts_as_qwen, tokenizer_files
from minimind.checkpoints.formats.layout import LAYOUTS, Layout, cut_part, lay_out
from minimind.checkpoints.formats.load_model import find_tokenizer_file
from minimind.checkpoints.formats.pth import EMBEDDING, choose_form
from minimind.checkpoints.formats.source import ModelSource
from minimind.checkpoints.safetensors import write_safetensors, write_shards
from minimind.config.run_config import DTYPE_NAMES, Precision
from minimind.data.tokenizer import CONFIG_NAME, load_tokenizer
from minimind.errors import UserError
from minimind.files import new_file, new_folder, replace_file, write_json
from minimind.inference.generation import end_tokens
from minimind.inference.sampling import GenerationOptions
from minimind.model.config import ModelConfig
from minimind.model.pretrained import CONFIG_FILE, MODEL_TYPE, TIED_NAME, write_config
from minimind.model.router import BIAS_NAME
from minimind.units import parse_size

# Our own form is one file of any size: only this project reads it, tensor by tensor.
_ONE_FILE = 1 << 62


@dataclass(frozen=True, kw_only=True)
class ExportFlags:
    """Write a model as a folder: for the Hugging Face tools, for this project, or as a .pth of jingyaogong/minimind."""

    run_dir: Path | None = None
    """A run's folder; its newest valid checkpoint is exported."""
    step: int | None = None
    """With --run-dir: the checkpoint of this step instead."""
    checkpoint: Path | None = None
    """In place of --run-dir: a checkpoint, an export, a Llama, Qwen3 or Qwen3-MoE folder, or a .pth."""
    output: Path
    """The folder to make."""
    format: Literal["hf", "gguf", "minimind", "pth", "peft"] = "hf"
    """hf: config, safetensors and tokenizer for transformers and vLLM; gguf: one file for llama.cpp; minimind: this
    project's own; peft: LoRA's adapters alone. All others hold them merged into the weights."""
    dtype: Precision = "fp32"
    """Type of the weights."""
    max_shard_size: str = "5GB"
    """hf: most bytes of one file of weights, such as 500MB."""
    tokenizer: Path | None = None
    """Tokenizer file or folder, if none is stored beside the weights."""
    model: str | None = None
    """For a .pth: the preset with what tensor shapes do not show (heads, experts a token) [default: by its form]."""

    def __post_init__(self) -> None:
        if (self.run_dir is None) == (self.checkpoint is None):
            raise UserError("give either --run-dir RUN or --checkpoint PATH")
        if self.step is not None and self.run_dir is None:
            raise UserError("step needs --run-dir")
        parse_size(self.max_shard_size, "max_shard_size")


def choose_checkpoint(flags: ExportFlags) -> Path:
    """The path that the flags name."""
    if flags.checkpoint is not None:
        return flags.checkpoint
    assert flags.run_dir is not None
    if not checkpoints_folder(flags.run_dir).is_dir():
        raise UserError(f"run_dir: {flags.run_dir} is not a run; for anything else use --checkpoint")
    if flags.step is None:
        return flags.run_dir
    folder = checkpoints_folder(flags.run_dir) / checkpoint_name(flags.step)
    if not folder.is_dir():
        raise UserError(f"step: {flags.run_dir} has no checkpoint of step {flags.step}; list them with "
                        f"python -m minimind.checkpoint list {flags.run_dir}")  # fmt: skip
    return folder


def export(source: ModelSource, flags: ExportFlags) -> str:
    """Write `source` in the format of the flags (atomic); returns the name of the result's architecture or file.

    Raises:
        UserError: the format cannot hold this model, a weight overflows the type, or the folder cannot be written.
    """
    writers = {
        "hf": write_huggingface, "gguf": write_as_gguf, "minimind": write_own, "pth": write_as_pth, "peft": write_peft,
    }  # fmt: skip
    try:
        with new_folder(flags.output) as folder:
            return writers[flags.format](source, flags, folder)
    except OSError as error:
        raise UserError(f"output {flags.output}: cannot be written: {error.strerror or error}") from None


def write_huggingface(source: ModelSource, flags: ExportFlags, folder: Path) -> str:
    """config.json, generation_config.json, safetensors and the tokenizer's files."""
    kind = choose_architecture(source.config)
    tokenizer_file = require_tokenizer(source, flags)
    files = tokenizer_files(tokenizer_file, source.config.max_position_embeddings)
    shard_bytes = parse_size(flags.max_shard_size, "max_shard_size")
    write_weights(source, flags, folder, LAYOUTS.get(kind, "per_expert"), shard_bytes)
    dtype = DTYPE_NAMES[flags.dtype]
    # Both names of the type: transformers 5 reads the first, older programs the second.
    write_json(folder / CONFIG_FILE, {**to_huggingface(source.config), "dtype": dtype, "torch_dtype": dtype})
    write_json(folder / "generation_config.json", generation_config(source.config, tokenizer_file))
    for name, content in files.items():
        replace_file(folder / name, content)
    if kind == "qwen2" and not cuts_as_qwen(tokenizer_file):
        print(
            "note: in a folder of kind qwen2 AutoTokenizer and vLLM cut texts as Qwen's tokenizer does, and this one "
            "does not: give them its ids (PreTrainedTokenizerFast.from_pretrained), or use --format gguf",
            file=sys.stderr,
        )
    return kind


def generation_config(config: ModelConfig, tokenizer_file: Path) -> dict[str, Any]:
    """The defaults of `minimind.generate` under transformers' names."""
    defaults, tokenizer = GenerationOptions(), load_tokenizer(tokenizer_file)
    return {
        "bos_token_id": config.bos_token_id,
        "eos_token_id": list(end_tokens(tokenizer)),
        "pad_token_id": tokenizer.eos_token_id,
        "do_sample": True,
        "temperature": defaults.temperature,
        "top_p": defaults.top_p,
        "max_new_tokens": defaults.max_new_tokens,
    }


def write_as_gguf(source: ModelSource, flags: ExportFlags, folder: Path) -> str:
    """One file of everything that llama.cpp needs."""
    config, file = source.config, require_tokenizer(source, flags)
    settings = json.loads(tokenizer_files(file, config.max_position_embeddings)[CONFIG_NAME])
    fields = model_fields(config)
    fields |= tokenizer_fields(file, settings, load_tokenizer(file).special_ids, config.vocab_size)
    shapes, dtypes, read = rounded_weights(source, flags, "gguf")
    more = rope_factors(config)
    shapes |= {name: tuple(tensor.shape) for name, tensor in more.items()}
    dtypes |= dict.fromkeys(more, torch.float32)
    path = folder / f"minimind-{flags.dtype}.gguf"
    write_gguf(path, fields, shapes, dtypes, lambda name: more[name] if name in more else read(name))
    return f"{path.name} of llama.cpp ({fields['general.architecture']})"


def write_own(source: ModelSource, flags: ExportFlags, folder: Path) -> str:
    """config.json, model.safetensors and the tokenizer."""
    write_weights(source, flags, folder, "fused", _ONE_FILE)
    write_config(folder / CONFIG_FILE, source.config)
    copy_tokenizer(source, flags, folder)
    return MODEL_TYPE


def write_as_pth(source: ModelSource, flags: ExportFlags, folder: Path) -> str:
    """One file of weights under the name that their scripts expect, our config as JSON, and the tokenizer. The whole
    model is held in memory."""
    config = source.config
    shapes, _, read = rounded_weights(source, flags, choose_form(config))
    tensors = {name: read(name).contiguous().clone() for name in shapes}
    if config.tie_word_embeddings:
        tensors[TIED_NAME] = tensors[EMBEDDING]
    path = folder / f"pretrain_{config.hidden_size}{'_moe' if config.use_moe else ''}.pth"
    with new_file(path) as temporary:
        torch.save(tensors, temporary)
    write_config(path.with_suffix(".json"), config)
    copy_tokenizer(source, flags, folder)
    return f"{path.name} of jingyaogong/minimind ({'current' if config.qk_norm else 'older'} form)"


def write_peft(source: ModelSource, flags: ExportFlags, folder: Path) -> str:
    """LoRA's adapters without the model that they belong to."""
    adapters = peft.require_adapters(source)
    tensors = peft.adapter_tensors(source.config, adapters)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    dtype = getattr(torch, DTYPE_NAMES[flags.dtype])
    write_safetensors(folder / peft.WEIGHTS_FILE, shapes, tensors.__getitem__, dtype=dtype)
    write_json(folder / peft.CONFIG_FILE, peft.adapter_config(source.config, adapters))
    return f"adapters of rank {adapters.lora.rank} for {adapters.base}"


def write_weights(source: ModelSource, flags: ExportFlags, folder: Path, layout: Layout, max_bytes: int) -> None:
    """The weights in a layout as safetensors, one tensor in memory at a time."""
    shapes, dtypes, read = rounded_weights(source, flags, layout)
    exact = {name for name, dtype in dtypes.items() if dtype == torch.float32}
    dtype = getattr(torch, DTYPE_NAMES[flags.dtype])
    write_shards(folder, shapes, read, dtype=dtype, max_shard_bytes=max_bytes, exact=exact)


def rounded_weights(
    source: ModelSource, flags: ExportFlags, layout: Layout
) -> tuple[dict[str, tuple[int, ...]], dict[str, torch.dtype], Callable[[str], Tensor]]:
    """Shapes and types of a layout's tensors, and what reads one as its type, the wanted one for most.

    A selection bias stays float32; in GGUF norms, biases and routers too.
    """
    parts = {part.name: part for part in lay_out(source.config, layout)}
    dtypes = dict.fromkeys(parts, getattr(torch, DTYPE_NAMES[flags.dtype]))
    for name, part in parts.items():
        if name.endswith(BIAS_NAME) or (layout == "gguf" and (len(part.shape) == 1 or "ffn_gate_inp" in name)):
            dtypes[name] = torch.float32
    read_own = functools.lru_cache(maxsize=1)(source.read)  # the parts of one tensor are asked for one after another
    bar = tqdm(total=len(parts), unit="tensor", desc="exporting", disable=None, leave=False)

    def read(name: str) -> Tensor:
        bar.update()
        tensor = cut_part(parts[name], read_own)
        converted = tensor.to(dtypes[name])
        if converted.dtype == torch.float16 and not converted.isfinite().all() and tensor.isfinite().all():
            largest = float(tensor.abs().max())
            raise UserError(f"dtype: {name} holds {largest:.3g}, which overflows fp16; use --dtype bf16 or fp32")
        return converted

    return {name: part.shape for name, part in parts.items()}, dtypes, read


def find_given_tokenizer(source: ModelSource, flags: ExportFlags) -> Path | None:
    """The given tokenizer, or the one beside the weights, if any."""
    return source.tokenizer_file if flags.tokenizer is None else find_tokenizer_file(flags.tokenizer)


def require_tokenizer(source: ModelSource, flags: ExportFlags) -> Path:
    """As `find_given_tokenizer`. Raises `UserError` when there is none."""
    file = find_given_tokenizer(source, flags)
    if file is None:
        raise UserError(f"{source.where}: there is no tokenizer beside it; give --tokenizer")
    return file


def copy_tokenizer(source: ModelSource, flags: ExportFlags, folder: Path) -> None:
    """The tokenizer's file and its settings, if it has any; a model may come without a tokenizer."""
    file = find_given_tokenizer(source, flags)
    if file is None:
        print(f"note: there is no tokenizer beside {source.where}, so the export has none", file=sys.stderr)
        return
    for path in (file, file.with_name(CONFIG_NAME)):
        if path.is_file():
            replace_file(folder / path.name, path.read_bytes())
