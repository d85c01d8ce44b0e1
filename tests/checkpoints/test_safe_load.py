"""Files of other Pythons are read, and no more is run for it."""

import pytest
import torch
from deepspeed.runtime.fp16.loss_scaler import LossScaler
from deepspeed.runtime.zero.config import ZeroStageEnum

from minimind.checkpoints.engine_files import _CLASSES
from minimind.checkpoints.manifest import CheckpointError
from minimind.checkpoints.safe_load import load_states, read_states


class Getattr:
    """Pickled as a call of `getattr`, as Python 3.11.0 to 3.11.3 do it with members of enumerations."""

    def __init__(self, *args):
        self.args = args

    def __reduce__(self):
        return getattr, self.args


def test_a_file_of_python_3_11_2(tmp_path):
    path = tmp_path / "states.pt"
    torch.save({"zero_stage": Getattr(ZeroStageEnum, "gradients"), "weight": torch.ones(2)}, path)
    assert load_states(path, _CLASSES, mmap=False)["zero_stage"] is ZeroStageEnum.gradients
    assert read_states(path)["zero_stage"].args == ("gradients",)


@pytest.mark.parametrize("args", [(LossScaler, "__init__"), (ZeroStageEnum, "__init__"), (torch.ones(1), "tolist")])
def test_other_attributes_are_refused(tmp_path, args):
    torch.save({"zero_stage": Getattr(*args)}, tmp_path / "states.pt")
    with pytest.raises(
        CheckpointError, match=r"states.pt: (not loaded, because only tensors .*getattr|cannot be read)"
    ):
        load_states(tmp_path / "states.pt", _CLASSES, mmap=False)
