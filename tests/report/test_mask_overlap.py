"""The masks of a search compared, against counting."""

from __future__ import annotations

import pytest
import torch

from irdscale.masks.mask import Mask
from irdscale.report.mask_overlap import by_layer, concentration, most_held, overlaps

SHAPES = {"wte.weight": (40,), "h.0.w": (30,), "h.0.b": (10,), "h.11.w": (20,)}


def mask(**indices: list[int]) -> Mask:
    names = {"e": "wte.weight", "a": "h.0.w", "b": "h.0.b", "z": "h.11.w"}
    return Mask({names[k]: torch.tensor(v, dtype=torch.int32) for k, v in indices.items()}, SHAPES)


def test_masks_by_layer_and_in_common() -> None:
    large = mask(e=[0, 1, 2, 3], a=[5, 6, 7], z=[1, 2, 3])
    middle = mask(e=[0, 1, 2], a=[5, 6], b=[1], z=[1, 2, 3, 4])
    small = mask(e=[3], a=[7, 8], b=[1], z=[3, 4, 5, 6, 7, 8])
    found = overlaps({"8": large, "4": middle, "2": small}, 10)
    assert found.shares == [[1.0, 0.8, 0.3], [0.8, 1.0, 0.3], [0.3, 0.3, 1.0]]
    assert found.chance == 10 / 100
    layers = by_layer([large, middle, small])
    assert [layer.name for layer in layers] == ["0", "11", "other"]
    assert [layer.shares for layer in layers] == [[0.3, 0.3, 0.3], [0.3, 0.4, 0.6], [0.4, 0.3, 0.1]]
    assert [layer.kept for layer in layers] == [1 / 3, 1 / 6, 1.0]
    assert [layer.chance for layer in layers] == [3 / 40, 3 / 20, 4 / 40]
    assert layers[1].gain == pytest.approx(0.3)
    assert by_layer([large, mask(e=[0])])[0].kept is None


def test_one_parameter_that_holds_most_of_a_mask_is_named() -> None:
    shapes = {"pooler": (5, 4), "word": (9, 20)}

    def of(pooler: int, word: int) -> Mask:
        return Mask({"pooler": torch.arange(pooler), "word": torch.arange(word)}, shapes)

    assert most_held([of(7, 3), of(8, 2)]) == ("pooler", 0.75, 0.1)
    assert most_held([Mask({}, shapes)]) is None
    said = concentration(of(6, 4))
    assert said is not None
    assert said.startswith("60 % of the mask's entries are in pooler, which has 10 % of the scored parameters: ")
    assert "fisher.exclude" in said
    assert "fisher.scope=layerwise" in said
    assert concentration(of(5, 5)) is None, "no more than half"
    assert concentration(of(0, 10)) is None, "no more than its size gives it"
    assert concentration(Mask({}, shapes)) is None
