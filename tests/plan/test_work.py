"""Operations and traffic, against numbers worked out by hand for Llama 3.1 8B."""

from __future__ import annotations

import pytest

from irdscale.memory.items import Zero
from irdscale.plan.work import all_gather, all_reduce, gradient_traffic, sample_flops, sums_traffic, weight_traffic
from tests.memory.llama import SHAPES

# Layers of 218,103,808 entries, and the head.
LAYERS, HEAD = 32 * 218_103_808, 128_256 * 4096


def test_forward_and_backward_of_a_sample():
    flops, attention = sample_flops(SHAPES, 2048), 4 * 32 * 4096 * 2048**2 / 2
    assert flops.forward == 2 * 2048 * (LAYERS + HEAD) + attention
    assert flops.backward == 2 * 2048 * (LAYERS + HEAD) + 2.5 * attention
    assert flops.weights == 2 * 2048 * LAYERS


def test_traces_take_the_cheaper_way_of_each_matrix():
    # Of 512 tokens the Gram matrices are cheaper for all but keys and values.
    expected = 32 * 512**2 * (2 * 8192 + 3 * 18_432 + 2 * 5120)
    assert sample_flops(SHAPES, 512).traces == expected
    # Of 16,384 the products are.
    flops = sample_flops(SHAPES, 16_384)
    assert flops.traces == flops.weights


def test_keys_and_values_at_the_bound():
    # 1024 x 4096 / (1024 + 4096) = 819.2 tokens
    less, more = (sample_flops(SHAPES, tokens).traces for tokens in (819, 820))
    assert more - less > 2 * 32 * (2 * 820 * 1024 * 4096 - 820**2 * 5120)


def test_rings():
    assert all_gather(800, 8) == 700
    assert all_reduce(800, 8) == 1400
    assert all_reduce(800, 1) == 0


@pytest.mark.parametrize(("stage", "times"), [(None, 2), (0, 2), (1, 2), (2, 2), (3, 3)])
def test_gradients_of_a_step(stage, times):
    assert gradient_traffic(1000, Zero(stage), 4) == times * 4000 * 3 / 4


def test_weights_of_a_batch_are_gathered_twice_but_for_those_still_there():
    assert weight_traffic(SHAPES, Zero(2), 8) == 0
    expected = 2 * (2 * 8_030_261_248 - 10**9) * 7 / 8
    assert weight_traffic(SHAPES, Zero(3, live=10**9), 8) == expected


def test_sums_of_a_pass():
    size = 4 * LAYERS
    assert sums_traffic(SHAPES, True, 4, 8, batches=3, boundaries=5) == 3 * size * 7 / 8
    assert sums_traffic(SHAPES, False, 4, 8, batches=3, boundaries=5) == 5 * 2 * size * 7 / 8
