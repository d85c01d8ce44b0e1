"""Average the weights of training checkpoints into an exported folder.

The mean of the last checkpoints often generalises better than any of them (Izmailov et al., arXiv:1803.05407). One
tensor of each is in memory at a time.
"""

from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm

from minimind.checkpoints.consolidate import TrainingCheckpoint
from minimind.checkpoints.formats.load_model import find_tokenizer_file
from minimind.checkpoints.manifest import CheckpointError, CheckpointManifest
from minimind.checkpoints.safetensors import write_safetensors
from minimind.errors import UserError
from minimind.files import new_folder, replace_file, write_json
from minimind.model.pretrained import CONFIG_FILE, MODEL_TYPE, WEIGHTS_FILE


def write_average(folders: Sequence[Path], output: Path) -> None:
    """Write the mean float32 weights of verified checkpoints, or those of one, as an exported folder (atomic).

    Raises:
        CheckpointError: the checkpoints are of different models.
        UserError: `output` exists, or cannot be written.
    """
    if not folders:
        raise UserError("paths: no checkpoint given; name one or more")
    if output.exists():
        raise UserError(f"output: {output} exists already; name a new folder")
    checkpoints = [TrainingCheckpoint(folder) for folder in folders]
    first = checkpoints[0]
    for other in checkpoints[1:]:
        _check_same_model(first.manifest, other.manifest)
    if first.buffers():
        raise CheckpointError(f"{folders[0]}: a model with buffers ({', '.join(first.buffers())}) cannot be averaged")
    tokenizer_file = find_tokenizer_file(folders[0].parent.parent)

    bar = tqdm(total=len(first.shapes), unit="tensor", disable=None, leave=False)
    try:
        with new_folder(output) as folder, bar:

            def mean(name: str) -> torch.Tensor:
                bar.update()
                return torch.stack([checkpoint.read(name).double() for checkpoint in checkpoints]).mean(0).float()

            write_safetensors(folder / WEIGHTS_FILE, first.shapes, mean)
            replace_file(folder / tokenizer_file.name, tokenizer_file.read_bytes())
            write_json(folder / CONFIG_FILE, {"model_type": MODEL_TYPE, **first.manifest.model})
    except OSError as error:
        raise UserError(f"output {output}: cannot be written: {error.strerror or error}") from None


def _check_same_model(a: CheckpointManifest, b: CheckpointManifest) -> None:
    differing = [key for key in sorted(a.model.keys() | b.model.keys()) if a.model.get(key) != b.model.get(key)]
    if differing:
        raise CheckpointError(f"checkpoints of steps {a.step} and {b.step}: different models: {', '.join(differing)}")
