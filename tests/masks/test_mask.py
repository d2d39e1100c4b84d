"""Exact top-k against a stable sort, and mask files."""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from irdscale import Fisher, Mask, top_k
from irdscale.errors import InputError
from irdscale.masks.mask import ROUNDING, rank_entries
from irdscale.sparse import sparsify, trained_on


def fisher_of(*scores: torch.Tensor) -> Fisher:
    return Fisher({f"p{i}": s for i, s in enumerate(scores)}, torch.zeros(1, dtype=torch.float64))


def fisher_of_one(name: str, scores: torch.Tensor) -> Fisher:
    return Fisher({name: scores}, torch.zeros(1, dtype=torch.float64))


def by_sorting(fisher: Fisher, k: int) -> list[tuple[str, int]]:
    """The oracle: a stable descending sort of the joined array keeps ties in the order of the global flat index."""
    flat = torch.cat([d.reshape(-1) for d in fisher.diagonal.values()])
    names = [(name, i) for name, d in fisher.diagonal.items() for i in range(d.numel())]
    return [names[i] for i in flat.sort(descending=True, stable=True).indices[:k].tolist()]


def entries(mask: Mask) -> set[tuple[str, int]]:
    return {(name, i) for name, index in mask.indices.items() for i in index.tolist()}


values = st.one_of(
    st.sampled_from([0.0, -0.0, 1.0, 0.5, 2.0**-149, 2.0**-148, 2.0**-126, 2.0**127]),
    st.floats(0, 2.0**127, width=32),
)


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.lists(values, max_size=12), min_size=1, max_size=4),
    st.floats(0, 1),
    st.sampled_from([torch.float32, torch.float64]),
)
def test_equals_a_stable_sort(lists: list[list[float]], share: float, dtype: torch.dtype) -> None:
    fisher = fisher_of(*[torch.tensor(scores, dtype=dtype) for scores in lists])
    total = sum(map(len, lists))
    for k in {0, round(share * total), total}:
        mask = top_k(fisher, k)
        expected = by_sorting(fisher, k)
        assert entries(mask) == set(expected)
        assert mask.k == k
        ranking = rank_entries(fisher, k)
        names = list(mask.shapes)
        found = zip(ranking.parameter.tolist(), ranking.index.tolist(), strict=True)
        assert [(names[p], i) for p, i in found] == expected
        for part in {0, k // 2, k}:
            assert ranking.prefix(part).hash == top_k(fisher, part).hash


@settings(max_examples=150, deadline=None)
@given(st.lists(st.lists(values, max_size=12), min_size=1, max_size=4), st.floats(0, 1))
def test_layerwise_deals_out_a_seat_at_a_time(lists: list[list[float]], share: float) -> None:
    fisher = fisher_of(*[torch.tensor(scores, dtype=torch.float64) for scores in lists])
    total = sum(map(len, lists))
    k = round(share * total)
    floor = ROUNDING * max((float(d.max()) for d in fisher.diagonal.values() if len(d)), default=0.0)
    cleared = {name: torch.tensor([0.0 if x < floor else x for x in d.tolist()]) for name, d in fisher.diagonal.items()}
    own = {name: by_sorting(fisher_of_one(name, d), d.numel()) for name, d in cleared.items()}
    seats = dict.fromkeys(own, 0)
    dealt = []
    for _ in range(k):
        # Webster: the next seat goes where (2 seats + 1) / 2n is smallest, of equal ones to the first.
        left = [name for name in own if seats[name] < len(own[name])]
        name = min(left, key=lambda n: Fraction(2 * seats[n] + 1, 2 * len(own[n])))
        dealt.append(own[name][seats[name]])
        seats[name] += 1
    ranking = rank_entries(fisher, k, "layerwise")
    names = list(fisher.diagonal)
    found = [(names[p], i) for p, i in zip(ranking.parameter.tolist(), ranking.index.tolist(), strict=True)]
    assert found == dealt
    assert entries(top_k(fisher, k, "layerwise")) == set(dealt)
    with pytest.raises(InputError, match=f"found k = {total + 1}; expected 0 to {total}"):
        rank_entries(fisher, total + 1, "layerwise")


def test_large_random_arrays_with_many_ties() -> None:
    torch.manual_seed(0)
    scores = [torch.rand(300, 70), torch.randint(0, 9, (50_000,)).float() / 8, torch.rand(7).double().float()]
    fisher = fisher_of(*scores)
    for k in (1, 999, 30_000, 71_000):
        mask = top_k(fisher, k)
        assert entries(mask) == set(by_sorting(fisher, k))
        assert all(bool((i[1:] > i[:-1]).all()) and i.dtype == torch.int32 for i in mask.indices.values())


@pytest.mark.parametrize(("value", "found"), [("nan", "NaN"), ("inf", "an infinite"), ("-1", "a negative")])
def test_unusable_scores_name_the_parameter(value: str, found: str) -> None:
    fisher = fisher_of(torch.ones(3), torch.tensor([1.0, float(value)]))
    for scope in ("global", "layerwise"):
        with pytest.raises(InputError, match=f"p1: found {found} Fisher information"):
            top_k(fisher, 1, scope)


@pytest.mark.parametrize("k", [-1, 5])
def test_k_out_of_range(k: int) -> None:
    with pytest.raises(InputError, match=f"found k = {k}; expected 0 to 4"):
        top_k(fisher_of(torch.ones(4)), k)


def test_save_and_load(tmp_path: Path) -> None:
    mask = top_k(fisher_of(torch.rand(30, 4), torch.zeros(5), torch.rand(8)), 40)
    mask.save(tmp_path / "m")
    again = Mask.load(tmp_path / "m")
    assert entries(again) == entries(mask)
    assert again.shapes == mask.shapes == {"p0": (30, 4), "p1": (5,), "p2": (8,)}
    assert (again.hash, again.k) == (mask.hash, 40)
    empty = top_k(fisher_of(torch.rand(3)), 0)
    empty.save(tmp_path / "m")
    assert Mask.load(tmp_path / "m").k == 0


def test_hash_tells_masks_apart() -> None:
    shapes = {"a": (4,), "b": (4,)}
    masks = [
        Mask({name: torch.tensor(index, dtype=torch.int32)}, shapes)
        for name in ("a", "b")
        for index in ([0], [1], [0, 1])
    ]
    assert len({mask.hash for mask in masks}) == 6
    wide = Mask({"a": torch.tensor([0], dtype=torch.int64)}, shapes)
    assert wide.hash == masks[0].hash


def test_damaged_masks_are_refused(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    top_k(fisher_of(torch.rand(30)), 9).save(folder)
    tensors, meta = folder / "mask.safetensors", folder / "mask.json"
    whole, text = tensors.read_bytes(), meta.read_text()
    for data in (whole[:-1], whole[:20], b"", whole[:-1] + bytes([whole[-1] ^ 1])):
        tensors.write_bytes(data)
        with pytest.raises(InputError, match=r"mask.safetensors: damaged mask"):
            Mask.load(folder)
    tensors.write_bytes(whole)
    for broken, message in (
        (text[:30], "not a mask"),
        ("[]", "found no mask"),
        (text.replace('"version": 1', '"version": 2'), "found version 2; expected 1"),
        (json.dumps(json.loads(text) | {"k": 8}), "do not match"),
    ):
        meta.write_text(broken)
        with pytest.raises(InputError, match=message):
            Mask.load(folder)
    with pytest.raises(InputError, match="cannot read the mask"):
        Mask.load(tmp_path / "nowhere")


def test_equal_masks_are_equal_in_whatever_order_they_are_kept() -> None:
    one = Mask({"b": torch.tensor([1], dtype=torch.int32), "a": torch.tensor([0, 2])}, {"b": (3,), "a": (3,)})
    other = Mask(dict(reversed(one.indices.items())), one.shapes)
    assert one == other
    assert len({one, other}) == 1
    assert one != Mask({"a": torch.tensor([0, 2])}, one.shapes)
    found = []
    for mask in (one, other):
        model = torch.nn.ParameterDict({name: torch.arange(3.0) + ord(name) for name in ("b", "a")})
        found.append((trained_on(sparsify(model, mask)), list(dict(model.named_parameters()))))
    assert found[0] == found[1]
