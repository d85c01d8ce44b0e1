"""Write a model's folder in MiniMind's own form: `config.json` and `model.safetensors`.

`checkpoints/formats` reads it, as it reads every other form.
"""

from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind.errors import UserError
from minimind.files import new_file, write_json
from minimind.model.config import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "minimind"
TIED_NAME = "lm_head.weight"
"""The second name of a tied matrix; a file holds the first only."""


def write_config(path: Path, config: ModelConfig) -> None:
    """Write a config as our `config.json`, whole or not at all."""
    write_json(path, {"model_type": MODEL_TYPE, **config.to_dict()})


def write_pretrained(folder: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's config and tensors into `folder`, made if need be; each file appears whole or not at all.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    kept = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    if config.tie_word_embeddings:
        kept.pop(TIED_NAME, None)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with new_file(folder / WEIGHTS_FILE) as temporary:
            save_file(kept, temporary, metadata={"format": "pt"})
        write_config(folder / CONFIG_FILE, config)
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be written: {error}") from error
