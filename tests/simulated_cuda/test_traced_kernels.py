"""How many kernels a GPU starts for a block and for the loss, as torch's compiler writes them."""

from traced_kernels import count_all


def test_compiled_a_block_and_the_loss_take_a_third_of_the_kernels_at_most(one_gpu):
    (found,) = one_gpu.run(count_all)
    assert found["graphs of a block"] == 2, "the block breaks into parts"
    traced, products = found["block, eager, as traced"][0], 7 * 3 + 2
    total, passes = found["block, compiled"]
    assert total == passes + products and 3 * total <= traced
    # Beside a GPU that has a kernel for a whole norm already.
    own_total, own_passes = found["block, eager, with CUDA's own norm"]
    assert 5 * passes <= 2 * own_passes and own_total == own_passes + products
    assert found["loss, compiled"][0] <= 2 and found["loss, eager"][0] >= 3 * found["loss, compiled"][0]
