"""Write a model's folder in MiniMind's own form: `config.json` and `model.safetensors`.

`checkpoints/formats` reads it, as it reads every other form.
"""

import contextlib
import json
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from minimind.errors import UserError
from minimind.files import fsync_folder, replace_file, temporary_name
from minimind.model.config import ModelConfig

CONFIG_FILE = "config.json"
WEIGHTS_FILE = "model.safetensors"
MODEL_TYPE = "minimind"
# The second name of a tied matrix; the file holds the first only.
_TIED_NAME = "lm_head.weight"


def write_pretrained(folder: str | Path, config: ModelConfig, tensors: Mapping[str, Tensor]) -> None:
    """Write a model's config and tensors into `folder`, made if need be; each file appears whole or not at all.

    Raises:
        UserError: the folder cannot be written, or the disk is full.
    """
    folder = Path(folder)
    kept = {
        name: tensor.detach().contiguous()
        for name, tensor in tensors.items()
        if not (config.tie_word_embeddings and name == _TIED_NAME)
    }
    weights = folder / WEIGHTS_FILE
    temporary = temporary_name(weights)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(kept, temporary, metadata={"format": "pt"})
        with open(temporary, "rb") as file:
            os.fsync(file.fileno())
        os.replace(temporary, weights)
        fsync_folder(folder)
        text = json.dumps({"model_type": MODEL_TYPE, **config.to_dict()}, indent=2)
        replace_file(folder / CONFIG_FILE, text + "\n")
    except (OSError, SafetensorError) as error:
        raise UserError(f"{folder}: the model could not be written: {error}") from error
    finally:
        with contextlib.suppress(OSError):
            temporary.unlink(missing_ok=True)
