"""How many kernels training takes on a GPU, before and after compilation."""

import pytest
from simulated_kernels import count_block, count_loss


def show(name: str, found: dict[str, dict[str, int]]) -> tuple[int, int]:
    eager, compiled = (sum(kernels.values()) for kernels in found.values())
    print(f"{name}: {eager} kernels, compiled {compiled}", *(f"    {how}: {found[how]}" for how in found), sep="\n")
    return eager, compiled


@pytest.mark.parametrize("autocast", [False, True], ids=["bf16 weights", "autocast"])
def test_a_compiled_block_takes_at_most_a_third_of_the_kernels(one_gpu, autocast):
    eager, compiled = show("block, forward and backward", one_gpu.run(count_block, autocast)[0])
    assert compiled * 3 <= eager


def test_the_compiled_loss_reads_its_logits_twice(one_gpu):
    eager, compiled = show("loss of a chunk and its gradient", one_gpu.run(count_loss)[0])
    assert compiled <= 3 and compiled * 3 <= eager
