"""Sums of squares and traces at the sizes at which products are combined or divided, against formed gradients."""

from __future__ import annotations

import pytest
import torch

from irdscale.fisher import squares
from irdscale.fisher.squares import Buffers, add_squares, add_traces
from irdscale.fisher.terms import Outer, Term


def outer(tokens: int, rows: int, columns: int, batch: int = 5, seed: int = 0) -> Outer:
    generator = torch.Generator().manual_seed(seed)
    left, right = (torch.randn(batch, tokens, n, generator=generator, dtype=torch.float64) for n in (rows, columns))
    return Outer(left, right)


def gradients(*terms: Outer) -> torch.Tensor:
    return sum(torch.einsum("btp,btq->bpq", t.left_BTP, t.right_BTQ) for t in terms)  # type: ignore[return-value]


@pytest.mark.parametrize("traced", [False, True])
@pytest.mark.parametrize(("rows", "columns"), [(4, 6), (8, 5), (6, 9), (9, 9)])
def test_squares(rows: int, columns: int, traced: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # Five samples in calls of four, two and one.
    monkeypatch.setattr(squares, "ENTRIES_A_CALL", 110)
    term = outer(3, rows, columns)
    gradient_BPQ = gradients(term)
    total = torch.ones(rows, columns, dtype=torch.float64)
    trace_B = torch.ones(5, dtype=torch.float64) if traced else None
    add_squares([term], total, trace_B, Buffers())
    torch.testing.assert_close(total, 1 + gradient_BPQ.square().sum(0), rtol=1e-12, atol=0)
    if trace_B is not None:
        torch.testing.assert_close(trace_B, 1 + gradient_BPQ.square().sum((1, 2)), rtol=1e-12, atol=0)


@pytest.mark.parametrize("tokens", [1, 63, 64, 65, 150, 192])
def test_traces_by_blocks_of_tokens(tokens: int) -> None:
    term = outer(tokens, 400, 500)
    trace_B = torch.ones(5, dtype=torch.float64)
    add_traces([term], torch.Size((400, 500)), trace_B, Buffers())
    torch.testing.assert_close(trace_B, 1 + gradients(term).square().sum((1, 2)), rtol=1e-12, atol=0)


def test_traces_of_modules_that_see_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    formed: list[torch.Tensor] = []
    gram = squares._gram
    monkeypatch.setattr(squares, "_gram", lambda x: formed.append(x) or gram(x))
    first, second = outer(70, 200, 300), outer(70, 200, 300, seed=1)
    shared = Outer(second.left_BTP, first.right_BTQ.view_as(first.right_BTQ))
    buffers, shape = Buffers(), torch.Size((200, 300))

    def check(term: Outer, forms: int) -> None:
        formed.clear()
        terms: list[Term] = [term]
        trace_B = torch.zeros(5, dtype=torch.float64)
        add_traces(terms, shape, trace_B, buffers)
        torch.testing.assert_close(trace_B, gradients(term).square().sum((1, 2)), rtol=1e-12, atol=0)
        assert len(formed) == forms

    check(first, 2)
    check(shared, 1)
    check(second, 2)
    check(Outer(first.left_BTP, second.right_BTQ.flip(1)), 2)
    check(first, 2)
    first.right_BTQ.mul_(2)
    check(first, 2)
    buffers.forget()
    check(first, 2)
