"""Read a model's weights from any supported form, one tensor at a time, by our names; loading and export both use it.

Forms: a run, one of its checkpoints, an exported folder (ours or Hugging Face), a `.pth` of jingyaogong/minimind. No
code in a file is run.
"""

import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import groupby
from pathlib import Path

from torch import Tensor

from minimind.checkpoints.base import find_base
from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.folder import checkpoints_folder, find_checkpoint
from minimind.checkpoints.formats.huggingface_config import from_huggingface
from minimind.checkpoints.formats.layout import LAYOUTS, Layout, join_parts, lay_out, own_shapes
from minimind.checkpoints.formats.pth import SUFFIXES, infer_config, layout_of, read_pth
from minimind.checkpoints.manifest import MANIFEST_NAME
from minimind.checkpoints.remote_copies import localise_model
from minimind.checkpoints.run_state import trained_settings
from minimind.checkpoints.safetensors import INDEX_FILE, SafetensorsFolder
from minimind.data.tokenizer import JSON_NAME, MODEL_NAME
from minimind.errors import UserError
from minimind.files import read_json
from minimind.model.config import ModelConfig
from minimind.model.lora import merge
from minimind.model.pretrained import CONFIG_FILE, MODEL_TYPE, TIED_NAME, WEIGHTS_FILE
from minimind.model.tuning import LoRA, adapters_of, trained_shapes
from minimind.remote import url_of

# Some versions of the Hugging Face tools saved these beside the weights.
_IGNORED_SUFFIX = "rotary_emb.inv_freq"


@dataclass(frozen=True)
class Adapters:
    """LoRA's adapters of a model, which are in its weights already as `ModelSource` reads them."""

    lora: LoRA
    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str], Tensor]
    base: Path
    """The model that they were trained on."""


@dataclass(frozen=True)
class ModelSource:
    """A model on disk."""

    where: Path
    config: ModelConfig
    shapes: Mapping[str, Sequence[int]]
    """By our names; a tied matrix once."""
    read: Callable[[str], Tensor]
    """One tensor, in host memory; it may be a view of a file."""
    tokenizer_file: Path | None
    """The one stored beside the weights, if any."""
    checkpoint: TrainingCheckpoint | None = None
    """None for exported models."""
    adapters: Adapters | None = None

    @property
    def folder(self) -> Path:
        """The folder that the weights lie in."""
        return self.where if self.where.is_dir() else self.where.parent

    @property
    def place(self) -> Path:
        """The path that opens this very model again, whatever its run has saved since."""
        return self.where if self.where.suffix in SUFFIXES else self.folder


def open_source(path: Path, base: ModelConfig | None = None, *, hashes: bool = True) -> ModelSource:
    """The model at `path`: a run (its newest valid checkpoint), one of its checkpoints, a folder with config.json and
    safetensors, a `.pth`, or a folder with one `.pth` in it.

    Args:
        base: for a `.pth`, the fields that tensor shapes do not show.
        hashes: compare the files of a training checkpoint with their sha256 (their sizes in any case).

    Raises:
        UserError: there is no model, a file is missing or damaged, or the weights do not fit the config.
    """
    if (url := url_of(path)) is not None:
        path = localise_model(url)
    if path.is_file():
        return _open_pth(path, base)
    if not path.is_dir():
        raise UserError(f"checkpoint {path} does not exist")
    if (path / MANIFEST_NAME).is_file() or checkpoints_folder(path).is_dir():
        folder = find_checkpoint(path, lambda message: print(message, file=sys.stderr), hashes=hashes)
        return open_checkpoint(folder, find_tokenizer(folder.parent.parent), hashes=hashes)
    has_config = (path / CONFIG_FILE).is_file()
    if has_config and ((path / WEIGHTS_FILE).is_file() or (path / INDEX_FILE).is_file()):
        kind, config = _read_config(path / CONFIG_FILE)
        layout = "fused" if kind == MODEL_TYPE else LAYOUTS.get(kind, "per_expert")
        files = SafetensorsFolder(path)
        return _open_parts(files.where, config, layout, files.shapes, files.read)
    found = [file for file in path.iterdir() if file.suffix in SUFFIXES]
    if len(found) == 1:
        return _open_pth(found[0], base)
    if has_config:
        raise UserError(f"checkpoint {path} has a {CONFIG_FILE}, but neither {WEIGHTS_FILE} nor {INDEX_FILE}")
    raise UserError(
        f"checkpoint {path} holds no model: it is neither a run's folder, nor a checkpoint, nor an export "
        f"(with a {CONFIG_FILE}), nor does it hold one .pth"
    )


def open_checkpoint(
    folder: Path,
    tokenizer_file: Path | None = None,
    *,
    read: Callable[[str], Tensor] | None = None,
    hashes: bool = True,
) -> ModelSource:
    """The model of a verified training checkpoint. Weights that were frozen are read from the model that it stands on,
    and adapters are merged into them, tensor by tensor.

    Args:
        read: gives what the checkpoint itself holds, in place of its own files.
        hashes: compare the sha256 of the frozen weights.
    """
    checkpoint = TrainingCheckpoint(folder)
    buffers = checkpoint.buffers()
    shapes = {**checkpoint.shapes, **{name: tuple(buffer.shape) for name, buffer in buffers.items()}}
    config = ModelConfig.from_dict(checkpoint.manifest.model)

    def read_files(name: str) -> Tensor:
        return buffers[name] if name in buffers else checkpoint.read(name)

    held = ModelSource(folder, config, shapes, read or read_files, tokenizer_file, checkpoint)
    if checkpoint.manifest.trained:
        return _stand_on_base(held, checkpoint, hashes=hashes)
    _check_size(folder, config, "fused", shapes)
    _check_shapes(folder, own_shapes(config), shapes)
    return held


def _stand_on_base(held: ModelSource, checkpoint: TrainingCheckpoint, *, hashes: bool) -> ModelSource:
    """The whole model of a checkpoint that holds a part of it."""
    settings, config, manifest = trained_settings(checkpoint.manifest), held.config, checkpoint.manifest
    _check_shapes(held.where, trained_shapes(config, settings.lora, settings.freeze), checkpoint.shapes)
    base = open_source(find_base(held.where, manifest, hashes=hashes), config, hashes=hashes)
    own, lora = own_shapes(config), settings.lora
    _check_shapes(base.where, own, base.shapes)

    def read(name: str) -> Tensor:
        if name in held.shapes:
            return held.read(name)
        weight = base.read(name)
        if lora is not None and lora.has(name):
            first, second = adapters_of(name)
            return merge(weight, held.read(first), held.read(second), lora.scale)
        return weight.float()

    adapters = None if lora is None else Adapters(lora, checkpoint.shapes, held.read, base.place)
    return replace(held, shapes=own, read=read, adapters=adapters)


def _read_config(path: Path) -> tuple[str, ModelConfig]:
    """The `model_type` of a config.json, ours or Hugging Face's, and the config of our model."""
    values = read_json(path, "model config")
    try:
        if not isinstance(values, dict):
            raise UserError("expected a JSON object")
        kind = str(values.get("model_type"))
        if kind != MODEL_TYPE:
            return kind, from_huggingface(values)
        return kind, ModelConfig.from_dict({name: value for name, value in values.items() if name != "model_type"})
    except UserError as error:
        raise UserError(f"model config {path}: {error}") from None


def _open_pth(path: Path, base: ModelConfig | None) -> ModelSource:
    tensors = read_pth(path)
    beside = path.with_suffix(".json")  # what an export writes, for what tensor shapes do not show
    if base is None and beside.is_file():
        base = _read_config(beside)[1]
    config = infer_config(path, tensors, base)
    shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
    return _open_parts(path, config, layout_of(config), shapes, tensors.__getitem__)


def _open_parts(
    where: Path,
    config: ModelConfig,
    layout: Layout,
    shapes: Mapping[str, tuple[int, ...]],
    read: Callable[[str], Tensor],
) -> ModelSource:
    _check_size(where, config, layout, shapes)
    parts = lay_out(config, layout)
    tied = TIED_NAME if config.tie_word_embeddings else None
    found = {name: shape for name, shape in shapes.items() if name != tied and not name.endswith(_IGNORED_SUFFIX)}
    _check_shapes(where, {part.name: part.shape for part in parts}, found)
    groups, own = {name: list(group) for name, group in groupby(parts, lambda part: part.own)}, own_shapes(config)

    def read_own(name: str) -> Tensor:
        return join_parts(groups[name], own[name], read)

    return ModelSource(where, config, own, read_own, find_tokenizer(where.parent))


def _check_size(where: Path, config: ModelConfig, layout: Layout, found: Mapping[str, Sequence[int]]) -> None:
    """Refuse a config of more than the files hold, before so much as the names of its tensors are made."""
    num_experts = 0 if layout == "fused" else config.num_moe_layers * config.num_experts
    if config.num_hidden_layers + num_experts > len(found):
        described = f"{config.num_hidden_layers:,} layers" + (f" and {num_experts:,} experts" if num_experts else "")
        raise UserError(f"{where}: the files hold {len(found):,} tensors, their config describes {described}")


def _check_shapes(where: Path, wanted: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]]) -> None:
    for name in sorted(wanted.keys() | found.keys()):
        if name not in wanted:
            raise UserError(f"{where}: tensor {name} has no place in the model that its config describes")
        if name not in found:
            raise UserError(f"{where}: tensor {name} of the model that its config describes is missing")
        if tuple(found[name]) != tuple(wanted[name]):
            shapes = f"{tuple(found[name])}, the model that its config describes has {tuple(wanted[name])}"
            raise UserError(f"{where}: tensor {name} is {shapes}")


def find_tokenizer(folder: Path) -> Path | None:
    """The tokenizer file in a folder, or None."""
    return next((folder / name for name in (MODEL_NAME, JSON_NAME) if (folder / name).is_file()), None)
