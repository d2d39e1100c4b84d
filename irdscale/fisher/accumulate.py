"""The diagonal Fisher information of a model over a data set, and each sample's trace."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from irdscale.errors import InputError
from irdscale.files import digest
from irdscale.fisher.capture import Capture, batch_size, frozen, why_no_rules
from irdscale.fisher.losses import Objective, TokenReduction, loss_kind, objective_losses
from irdscale.fisher.ranks import add_up, failing_together, own_share, rank_and_world, same_on_every_rank
from irdscale.fisher.rules import Buffers, Dense, Term, add_squares, add_traces
from irdscale.progress import bar

log = logging.getLogger(__name__)


class SizedDataset(Protocol):
    """Anything with a length and rows, such as a datasets.Dataset or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[list[Any]], dict[str, Any]]
# Takes a parameter's name, its terms over a batch, and the batch's float64 traces to add to.
Arrived = Callable[[str, list[Term], Tensor], None]
# Adds a batch's terms of one parameter to its sum, and to the batch's traces where they are wanted.
Add = Callable[[list[Term], Tensor, Tensor | None, Buffers], None]


@dataclass(frozen=True)
class Fisher:
    """Diagonal Fisher information and per-sample traces.

    Attributes:
        diagonal: name -> mean over samples of the squared gradient, in the parameter's shape.
        sample_trace: float64 [N], in data set order: each sample's sum of squared gradients over `diagonal`'s names.
        sample_gradients: gradients of single samples that were taken to get there.
    """

    diagonal: dict[str, Tensor]
    sample_trace: Tensor
    sample_gradients: int = 0

    def gather(self) -> dict[str, Tensor]:
        """The whole diagonal."""
        return self.diagonal


@dataclass
class SampleGradients:
    """One model and data set, ready for passes over chosen samples.

    A pass is exact for batches by the rules of `irdscale.fisher.rules` where `why_no_rules` finds nothing against
    them, and takes one sample per backward otherwise, which the log says.
    """

    model: nn.Module
    dataset: SizedDataset
    collate_fn: Collate
    scored: dict[str, nn.Parameter]
    batch_size: int = 8
    objective: Objective = "label"
    token_reduction: TokenReduction = "mean"
    seed: int = 0
    taken: int = 0
    _reason: str | None = None
    _checked: bool = False
    _buffers: Buffers = field(default_factory=Buffers)

    def accumulate(
        self,
        order: Sequence[int],
        sums: dict[str, Tensor],
        traces: Tensor | None = None,
        *,
        add: Add = add_squares,
        boundaries: Collection[int] = (),
        at_boundary: Callable[[int], None] | None = None,
        progress: bool = False,
        description: str = "Fisher",
    ) -> None:
        """Add each ordered sample's squared gradient to `sums`, and to its entry of `traces` [N] where given.

        `at_boundary(s)` is called when exactly the first s samples are in the sums; no batch crosses a boundary. With
        several ranks each takes its share of the samples, and all end with the whole sums. `add` may sum something
        other than squares.
        """

        def arrived(name: str, terms: list[Term], trace_B: Tensor) -> None:
            add(terms, sums[name], None if traces is None else trace_B, self._buffers)

        def reached(stop: int) -> None:
            add_up(list(sums.values()))
            if stop in boundaries and at_boundary is not None:
                at_boundary(stop)
            if stop < len(order):
                self._keep_on_first_rank(sums)

        # What the sums hold already counts once.
        self._keep_on_first_rank(sums)
        self._run(order, arrived, traces, boundaries, reached, progress, description)

    @staticmethod
    def _keep_on_first_rank(sums: dict[str, Tensor]) -> None:
        if rank_and_world()[0] > 0:
            for total in sums.values():
                total.zero_()

    def add_traces(self, order: Sequence[int], traces: Tensor, *, progress: bool = False) -> None:
        """Add the squared gradient norm of each ordered sample to its entry of `traces` (float64 [N])."""

        def arrived(name: str, terms: list[Term], trace_B: Tensor) -> None:
            add_traces(terms, self.scored[name].shape, trace_B, self._buffers)

        self._run(order, arrived, traces, (), None, progress, "Sample traces")

    def _run(
        self,
        order: Sequence[int],
        arrived: Arrived,
        traces: Tensor | None,
        boundaries: Iterable[int],
        at_boundary: Callable[[int], None] | None,
        progress: bool,
        description: str,
    ) -> None:
        if not self._checked:
            with failing_together():
                work = self._work(order) if rank_and_world()[1] > 1 else {}
            same_on_every_rank(work)
            with failing_together():
                # Two samples show whether batches are safe, even where the first batch is of one.
                self._check(self._batch(order[: min(2, self.batch_size)]))
        own_traces = None if traces is None else torch.zeros_like(traces)
        taken_before, start = self.taken, 0
        with bar(description, len(order), enabled=progress and rank_and_world()[0] == 0) as advance:
            for stop in sorted({b for b in boundaries if 0 < b < len(order)} | {len(order)}):
                with failing_together():
                    own = own_share(order[start:stop])
                    for first in range(0, len(own), self.batch_size):
                        indices = own[first : first + self.batch_size]
                        trace_B = torch.zeros(len(indices), dtype=torch.float64, device=self._device)
                        self._take(indices, arrived, trace_B)
                        if own_traces is not None:
                            own_traces.index_add_(0, torch.tensor(indices), trace_B.cpu())
                        advance(len(indices) * rank_and_world()[1])
                if at_boundary is not None:
                    at_boundary(stop)
                start = stop
        self._add_up_counts(taken_before)
        if traces is not None and own_traces is not None:
            add_up([own_traces])
            traces += own_traces

    def _take(self, indices: Sequence[int], arrived: Arrived, trace_B: Tensor) -> None:
        if self._reason is None:
            self._by_rules(self._batch(indices), indices, arrived, trace_B)
            return
        for n, index in enumerate(indices):
            self._one(index, arrived, trace_B[n : n + 1])

    def _add_up_counts(self, before: int) -> None:
        taken = torch.tensor([self.taken - before])
        add_up([taken])
        self.taken = before + int(taken)

    def _work(self, order: Sequence[int]) -> dict[str, Any]:
        """What must be the same on every rank; of the samples, their number and the first and the last one."""
        parameters = [[name, list(p.shape), str(p.dtype)] for name, p in self.scored.items()]
        ends = [sorted(self._batch([i]).items()) for i in (order[0], order[-1])]
        values = [[k, str(v.tolist() if isinstance(v, Tensor) else v)] for end in ends for k, v in end]
        return {
            "number of samples": len(self.dataset),
            "data set": digest(values),
            "model": digest(parameters),
            "objective": f"{self.objective}, {self.token_reduction}, seed {self.seed}",
            "batch size": self.batch_size,
        }

    @property
    def _device(self) -> torch.device:
        return next(self.model.parameters()).device

    def _batch(self, indices: Sequence[int]) -> dict[str, Any]:
        device = self._device
        batch = self.collate_fn([self.dataset[i] for i in indices])
        if "labels" not in batch and self.objective == "label":
            raise InputError(f"sample {indices[0]}: found no labels; expected them for fisher.objective 'label'")
        return {key: value.to(device) if isinstance(value, Tensor) else value for key, value in batch.items()}

    def _check(self, batch: dict[str, Any]) -> None:
        self._reason = why_no_rules(self.model, self.scored, batch)
        self._checked = True
        if self._reason is not None:
            log.warning("Fisher takes one sample per backward: %s", self._reason)

    def _losses(self, logits: Tensor, batch: dict[str, Any], indices: Sequence[int]) -> list[Tensor]:
        labels = batch.get("labels")
        kind = loss_kind(self.model, logits, logits.new_zeros(len(logits)) if labels is None else labels)
        losses = list(objective_losses(self.objective, kind, logits, labels, indices, self.seed, self.token_reduction))
        for loss_B in losses:
            bad = (~loss_B.isfinite()).nonzero().flatten().tolist()
            if bad:
                row = self.dataset[indices[bad[0]]]
                row = f" (row {row['row']} of its split)" if isinstance(row, dict) and "row" in row else ""
                raise InputError(
                    f"sample {indices[bad[0]]}{row}: found a loss of {loss_B[bad[0]].item()}; expected a finite number"
                )
        return losses

    def _by_rules(self, batch: dict[str, Any], indices: Sequence[int], arrived: Arrived, trace_B: Tensor) -> None:
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with (
            frozen(self.model),
            torch.enable_grad(),
            Capture(self.model, self.scored, lambda name, terms: arrived(name, terms, trace_B)) as capture,
        ):
            losses = self._losses(_logits(capture.forward(inputs, batch_size(batch))), batch, indices)
            for i, loss_B in enumerate(losses):
                capture.backward(loss_B, retain_graph=i + 1 < len(losses))
                self.taken += len(indices)

    def _one(self, index: int, arrived: Arrived, trace_1: Tensor) -> None:
        batch = self._batch([index])
        inputs = {key: value for key, value in batch.items() if key != "labels"}
        with frozen(self.model, self.scored), torch.enable_grad():
            losses = self._losses(_logits(self.model(**inputs)), batch, [index])
            for i, loss_1 in enumerate(losses):
                gradients = torch.autograd.grad(
                    loss_1.sum(), list(self.scored.values()), allow_unused=True, retain_graph=i + 1 < len(losses)
                )
                self.taken += 1
                with torch.no_grad():
                    for name, gradient in zip(self.scored, gradients, strict=True):
                        if gradient is not None:
                            arrived(name, [Dense(gradient.unsqueeze(0))], trace_1)


def _logits(output: Any) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output
    if not isinstance(logits, Tensor):
        raise InputError(f"the model's output is {type(output).__name__}; expected one with logits")
    return logits


def scored_parameters(
    model: nn.Module, include: str | Sequence[str] | None = None, exclude: str | Sequence[str] | None = None
) -> dict[str, nn.Parameter]:
    """The floating-point parameters that match an `include` expression and no `exclude` expression, tied ones once.

    Raises:
        InputError: an expression is malformed, or no parameter is left.
    """
    wanted, unwanted = _expressions("include", include), _expressions("exclude", exclude)
    kept = {
        name: parameter
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and (wanted is None or any(e.search(name) for e in wanted))
        and not any(e.search(name) for e in unwanted or ())
    }
    if not kept:
        names = ", ".join(list(dict(model.named_parameters()))[:3])
        raise InputError(
            f"fisher.include={include} and fisher.exclude={exclude}: found no parameter; expected names such as {names}"
        )
    return kept


def _expressions(key: str, patterns: str | Sequence[str] | None) -> list[re.Pattern[str]] | None:
    if patterns is None:
        return None
    try:
        return [re.compile(p) for p in ([patterns] if isinstance(patterns, str) else patterns)]
    except re.error as error:
        raise InputError(f"fisher.{key}: found {patterns!r}; expected regular expressions ({error})") from None


def accumulate_fisher(
    model: nn.Module,
    dataset: SizedDataset,
    *,
    collate_fn: Collate,
    batch_size: int = 8,
    objective: Objective = "label",
    include: str | Sequence[str] | None = None,
    exclude: str | Sequence[str] | None = None,
    layout: Literal["replicated", "sharded"] = "replicated",
    dtype: torch.dtype = torch.float32,
    progress: bool = False,
    token_reduction: TokenReduction = "mean",
    seed: int = 0,
) -> Fisher:
    """The diagonal Fisher information of `model` over `dataset`: the mean of squared per-sample gradients.

    Each sample's own gradient is squared, then summed (Sung, Nair, Raffel 2021, arXiv 2111.09839, equation 3); the
    answer does not depend on the batch size or the number of ranks beyond float rounding. The model is put in
    evaluation mode for the passes and left as it was found. With torch.distributed initialised this is collective:
    every rank passes the same model and full data set, takes its share of the samples, and returns the whole result.

    Args:
        model: returns logits [B, C] (classification, regression) or [B, T, V] (causal language model).
        dataset: rows for `collate_fn`; N of them.
        collate_fn: a list of rows -> a dictionary of tensors whose first dimension is the batch, with `labels`.
        objective: `label` (the data's labels), `sampled` (drawn from the model, by `seed` and the sample's index) or
            `expected` (over all classes, one backward pass each).
        include, exclude: regular expressions, searched in parameter names.
        layout: `replicated`: every rank holds the whole diagonal; one process does in either layout.
        dtype: of the sums; squares are formed in float32 at least.
        token_reduction: for language models, a sample's loss is the mean or the sum over its target tokens.

    Raises:
        InputError: an unknown option, no parameter or sample is left, a sample's loss is not finite (named), or the
            model's loss is of a kind that is not covered, or the ranks differ in what they were given (named).
    """
    _one_of("objective", objective, ("label", "sampled", "expected"))
    _one_of("layout", layout, ("replicated", "sharded"))
    _one_of("token_reduction", token_reduction, ("mean", "sum"))
    if len(dataset) == 0:
        raise InputError("the data set is empty; expected at least one sample")
    if batch_size < 1:
        raise InputError(f"fisher.batch_size: found {batch_size}; expected at least 1")
    if layout == "sharded" and rank_and_world()[1] > 1:
        raise InputError("layout: found 'sharded' with several ranks; expected 'replicated'")
    samples = SampleGradients(
        model,
        dataset,
        collate_fn,
        scored_parameters(model, include, exclude),
        batch_size=batch_size,
        objective=objective,
        token_reduction=token_reduction,
        seed=seed,
    )
    sums = zero_sums(samples.scored, dtype)
    traces = torch.zeros(len(dataset), dtype=torch.float64)
    samples.accumulate(range(len(dataset)), sums, traces, progress=progress)
    for total in sums.values():
        total /= len(dataset)
    return Fisher(sums, traces, samples.taken)


def zero_sums(scored: dict[str, nn.Parameter], dtype: torch.dtype) -> dict[str, Tensor]:
    """Accumulators of each scored parameter's shape, beside it."""
    return {name: torch.zeros(p.shape, dtype=dtype, device=p.device) for name, p in scored.items()}


def _one_of(name: str, value: str, known: tuple[str, ...]) -> None:
    if value not in known:
        raise InputError(f"{name}: found {value!r}; expected one of {', '.join(known)}")
