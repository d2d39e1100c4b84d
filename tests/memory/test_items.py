"""Memory by item, against numbers worked out by hand for Llama 3.1 8B."""

from __future__ import annotations

import pytest

from irdscale.memory.items import (
    Zero,
    begin_items,
    evaluate_items,
    fisher_items,
    gradient_buffers,
    shipped,
    train_items,
    values_and_moments,
    weights,
    zero_from,
)
from irdscale.memory.sizes import GIB, Items, PassBytes, Shapes
from tests.memory.llama import SHAPES

PASS = PassBytes(saved=1000, peak=1500)


def test_whole_weights_are_two_bytes_an_entry():
    for stage in (None, 0, 1, 2):
        assert weights(SHAPES, shipped(stage), 8) == (16_060_522_496, 0)


def test_zero3_holds_an_eighth_and_gathers_what_it_may_keep():
    held, gathered = weights(SHAPES, Zero(3, live=10**9, prefetch=10**6), 8)
    assert held == 2_007_565_312
    # 10^9 entries, and on their way a million ahead and the embedding (128,256 x 4,096).
    assert gathered == 2 * (10**9 + 10**6 + 525_336_576)
    assert weights(SHAPES, Zero(3, offload_weights=True), 8)[0] == 0


def test_a_small_model_is_gathered_whole():
    small = Shapes(1000, 4, {"w": (10, 10)}, 0, [(10, 10)], 100, 300, 10, 1, 10, True, None)
    assert weights(small, Zero(3, live=10**9, prefetch=0), 2) == (2000, 4 * (1000 + 300))
    assert weights(small, Zero(3, live=10**9, prefetch=10**6), 2) == (2000, 4 * (1000 + 1000 + 300))


def test_replicated_sums_are_four_bytes_a_scored_entry():
    items = fisher_items(SHAPES, PASS, Zero(), 8, 4, sharded=False)
    assert items == Items(16_060_522_496, 1000, 27_917_287_424, 0, 500)
    assert fisher_items(SHAPES, PASS, Zero(), 8, 8, sharded=False).fisher == 2 * 27_917_287_424


def test_sharded_sums_are_an_eighth_and_two_buffers_of_the_largest_layer():
    items = fisher_items(SHAPES, PASS, Zero(), 8, 4, sharded=True)
    assert items.fisher == 27_917_287_424 // 8
    assert items.buffers == 500 + 4 * (14_336 * 4096) + 4 * (14_336 * 4096) // 8
    assert fisher_items(SHAPES, PASS, Zero(), 1, 4, sharded=True).fisher == 27_917_287_424


def test_offloaded_sums_leave_one_layer_behind():
    items = fisher_items(SHAPES, PASS, Zero(), 1, 4, sharded=False, offload=True)
    assert (items.fisher, items.buffers) == (0, 500 + 4 * 14_336 * 4096)


@pytest.mark.parametrize(
    ("stage", "expected"),
    [
        (None, 16_000),
        (0, 16_000),
        # Values and gradients whole; the optimizer's copy and moments of a quarter.
        (1, 8000 + 3000),
        (2, 4000 + 1000 + 3000),
        (3, 6000),
    ],
)
def test_a_thousand_numbers_on_four_ranks(stage, expected):
    assert values_and_moments(1000, shipped(stage), 4) == expected


def test_gradient_buffers():
    assert gradient_buffers(1000, Zero(), 1) == 0
    assert gradient_buffers(1000, Zero(), 2) == 4000
    assert gradient_buffers(1000, Zero(2, bucket=50, overlap=True), 2) == 400
    assert gradient_buffers(1000, Zero(2, bucket=50), 2) == 200
    assert gradient_buffers(1000, Zero(3, bucket=50, overlap=True), 2) == 200


def test_a_training_step_counts_the_mask_itself():
    items = train_items(SHAPES, PASS, Zero(), 1, 40_151_306)
    # 16 bytes an entry; an index, a place and a base number of two bytes beside.
    assert items.values_and_moments == 16 * 40_151_306
    assert items.buffers == 500 + 10 * 40_151_306
    assert items.total == 16_060_522_496 + 1000 + 500 + 26 * 40_151_306


def test_ranks_begin_by_copies_of_the_weights():
    items = begin_items(SHAPES, Zero(), 2, 1000)
    # Two buckets of 250 MiB, the mask and DistributedDataParallel's own bucket of gradients.
    assert items == Items(16_060_522_496, 0, 0, 4000, 2 * 250 * 2**20 + 10_000 + 4000)
    assert begin_items(SHAPES, Zero(), 1, 1000).total == begin_items(SHAPES, Zero(2), 2, 1000).total == 0


def test_measuring_keeps_no_moments():
    items = evaluate_items(SHAPES, PassBytes(0, 700), Zero(), 1, 1000)
    assert (items.activations, items.values_and_moments, items.buffers) == (700, 4000, 10_000)


def test_items_in_gib():
    assert Items(weights=GIB, buffers=GIB // 2).gib()["total"] == 1.5


def test_settings_of_a_file():
    assert zero_from(None, 4096) == Zero()
    settings = {
        "zero_optimization": {
            "stage": 3,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_max_live_parameters": 3e8,
            "offload_param": {"device": "cpu"},
        }
    }
    zero = zero_from(settings, 100)
    assert zero == Zero(3, bucket=10_000, overlap=True, live=300_000_000, prefetch=9000, offload_weights=True)
    assert zero_from({"zero_optimization": {"stage": 2}}, 100) == Zero(2, bucket=500_000_000)
