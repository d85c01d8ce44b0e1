"""The norm of inputs that no model has; `test_apply.py` compares norms and SwiGLU with the plain ones."""

import pytest
import torch

from minimind.model.kernels.layers import FastRMSNorm
from minimind.model.layers import RMSNorm


def make_norm(kind, width, dtype=torch.float32):
    norm = kind(width, 1e-5).to(dtype)
    with torch.no_grad():
        norm.weight.copy_(torch.linspace(0.5, 1.5, width))
    return norm


@pytest.mark.parametrize("shape", [(7, 24), (2, 5, 3, 24), (3, 1), (0, 24), (300, 1000)], ids=str)
@pytest.mark.parametrize("needed", [(True, True), (True, False), (False, True)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_norms_and_their_gradients_are_those_of_float64(shape, needed, dtype):
    torch.manual_seed(0)
    x, found = torch.randn(shape), []
    for kind, own in ((FastRMSNorm, dtype), (RMSNorm, torch.float64)):
        norm, inputs = make_norm(kind, shape[-1], own), x.detach().clone().to(own).requires_grad_(needed[0])
        norm.weight.requires_grad_(needed[1])
        output = norm(inputs)
        output.backward(torch.ones_like(output).cumsum(0))
        found.append([output, inputs.grad, norm.weight.grad])
    for ours, exact in zip(*found, strict=True):
        assert (ours is None) == (exact is None)
        if ours is not None:
            assert ours.dtype == dtype and ours.is_contiguous()
            torch.testing.assert_close(ours.double(), exact, rtol=5e-4 if dtype == torch.float32 else 1e-10, atol=1e-4)


def test_a_norm_of_strided_rows():
    whole = torch.randn(6, 4, 32, requires_grad=True)
    for view in (whole.transpose(0, 1), whole[:, 1:3], whole[..., ::2]):
        width = view.shape[-1]
        torch.testing.assert_close(make_norm(FastRMSNorm, width)(view), make_norm(RMSNorm, width)(view))
