"""Passes that deliver the gradients of single samples, in batches where the rules are exact for the model."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.distributed.ranks import (
    all_reduce_sum,
    current_group,
    failing_together,
    gather_texts,
    largest_of,
    rank_and_world,
    same_on_every_rank,
    shard,
)
from irdscale.distributed.watchdog import watched
from irdscale.distributed.zero3 import device_of, gathering, is_partitioned, shape_of
from irdscale.fisher.capture import Capture, SampleCapture, arrival_order, frozen
from irdscale.fisher.checkpoint import PassState, SavedPass
from irdscale.fisher.exactness import why_no_rules
from irdscale.fisher.halving import Batch, Batches
from irdscale.fisher.losses import Objective, TokenReduction
from irdscale.fisher.sample_loss import SampleLoss
from irdscale.fisher.sums import Sums
from irdscale.fisher.terms import Term
from irdscale.fisher.work import description_of, first_entries
from irdscale.models.batches import FIRST, Collate, LateRows, SizedDataset, has_token_labels, shared_batches
from irdscale.models.checks import padding_matters, require_causal, uneven_rows
from irdscale.utils.files import digest
from irdscale.utils.interrupts import deferred, wanted
from irdscale.utils.progress import Advance, bar

log = logging.getLogger(__name__)

# Batches between two moments in which losses and traces are copied from the device and ranks exchange errors.
BATCHES_BETWEEN = 16


@dataclass
class _OnDevice:
    """Results of recent batches that are still on the device: samples and their losses, samples and their traces."""

    losses: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)
    traces: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)

    def read(self, traces_N: Tensor) -> tuple[list[int], Tensor]:
        """Add the traces to `traces_N` and return the samples and losses; waits for the device once."""
        losses, traces = self.losses, self.traces
        self.losses, self.traces = [], []
        if not losses and not traces:
            return [], torch.zeros(0)
        found = torch.cat([loss_B.double() for _, loss_B in losses] + [trace_B for _, trace_B in traces]).cpu()
        samples = [i for indices, _ in losses for i in indices]
        if traces:
            places = torch.tensor([i for indices, _ in traces for i in indices])
            traces_N.index_add_(0, places, found[len(samples) :])
        return samples, found[: len(samples)]


@dataclass
class SampleGradients:
    """One model and data set, for passes over chosen samples.

    A pass takes batches if the rules are exact for the model (`irdscale.fisher.exactness`), padding does not change a
    sample's gradient, and the model's own loss is that of its logits. Otherwise it takes one sample per backward, and
    the log gives the reason. A batch that does not fit in memory is halved, and so are all later ones.

    Attributes:
        taken: gradients of single samples taken so far by all ranks
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
    loss: SampleLoss = field(init=False)
    _work: dict[str, Any] | None = field(default=None, init=False)
    _group: object = field(default=None, init=False)
    _capture: Capture | SampleCapture | None = field(default=None, init=False)
    _by_rules: bool = field(default=True, init=False)
    _batches: Batches = field(default_factory=Batches, init=False)
    _results: _OnDevice = field(default_factory=_OnDevice, init=False)

    def __post_init__(self) -> None:
        self.loss = self._new_loss()

    def _new_loss(self) -> SampleLoss:
        options = (self.model, self.dataset, self.collate_fn, self.objective, self.token_reduction, self.seed)
        return SampleLoss(*options, is_partitioned(self.model))

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every scored parameter."""
        return {name: shape_of(p) for name, p in self.scored.items()}

    @property
    def device(self) -> torch.device:
        """The device on which the model computes."""
        return device_of(self.model)

    @property
    def fitting(self) -> int:
        """Samples in a batch after all halvings; 0 before the first pass."""
        return self._batches.size

    def accumulate(
        self,
        order: Sequence[int],
        sums: Sums,
        traces: Tensor | None = None,
        *,
        boundaries: Collection[int] = (),
        at_boundary: Callable[[int], None] | None = None,
        progress: bool = False,
        description: str = "Fisher",
        saved: SavedPass | None = None,
    ) -> None:
        """Add each ordered sample's terms to `sums`, and its squared gradient norm to its entry of `traces` [N].

        `at_boundary(s)` is called when exactly the first s samples are in the sums; no batch crosses a boundary. Each
        rank takes its shard of the samples, and all ranks end with the sums complete.

        Args:
            saved: saves the state of the pass now and then, and when a signal interrupts it, which then raises
                KeyboardInterrupt; an interrupted pass continues from there
        """
        with watched():
            self._run(order, sums, traces, description, progress, saved, boundaries, at_boundary)

    def add_traces(
        self, order: Sequence[int], traces: Tensor, *, progress: bool = False, saved: SavedPass | None = None
    ) -> None:
        """Add the squared gradient norm of each ordered sample to its entry of `traces` (float64 [N])."""
        with watched():
            self._run(order, Sums(self.shapes), traces, "Sample traces", progress, saved)

    def label_losses(self, lengths: Sequence[int]) -> Tensor:
        """The loss of every sample by its own label, float64 [N], whatever the objective, by forward passes alone.

        Each rank takes its shard of the batches, and all ranks get all losses.

        Args:
            lengths: tokens of each sample; samples of similar length share a batch

        Raises:
            InputError: `prepare` raises it, or a sample's loss is not finite (named).
        """
        self.prepare(range(len(self.dataset)))
        by_label = replace(self.loss, objective="label")
        losses_N = torch.zeros(len(self.dataset), dtype=torch.float64)
        found = LateRows(losses_N)

        def measure(places: list[int]) -> None:
            (loss_B,) = by_label.of(places or [0], lambda inputs: self.model(**inputs))
            if places:
                found.add(places, loss_B)

        with self.forward_only(by_label) as fitting:
            shared_batches(self.model, lengths, fitting, measure)
            found.read()
        all_reduce_sum([losses_N])
        self.loss.check_finite(range(len(losses_N)), losses_N)
        return losses_N

    @contextmanager
    def forward_only(self, loss: SampleLoss) -> Iterator[int]:
        """The model ready for forward passes inside; yields the samples in a batch, the same number on all ranks."""
        # The smallest size of all ranks, since all must divide the samples alike.
        fitting = 1 if loss.uses_own else -largest_of([-self.fitting])[0]
        # Ranks of a partitioned model agree inside a pass.
        agreeing = nullcontext() if loss.partitioned else failing_together()
        with watched(), gathering(self.model), frozen(self.model), torch.no_grad(), agreeing:
            yield fitting

    def arrival_order(self, index: int) -> list[str]:
        """The scored names in the order in which a backward pass delivers them, the same on every rank."""
        with gathering(self.model):
            names = arrival_order(self.model, self.scored, self.loss.small_batch([index]))
        return gather_texts("\n".join(names))[0].split("\n")

    def prepare(self, order: Sequence[int]) -> dict[str, Any]:
        """Check, once per process group, that all ranks have the same work, and find out how to take samples.

        Returns:
            What identifies the work.

        Raises:
            InputError: a rank has other work, a sample has no labels, a language model sees its targets, or
                `token_reduction` differs from that of the model's own loss.
        """
        group = current_group()
        if self._work is None or self._group is not group:
            self._group, self.loss = group, self._new_loss()
            with failing_together():
                work = description_of(self.loss, self.scored, self.batch_size)
            same_on_every_rank(work)
            # Two samples show whether batches are exact, even if the first batch holds one sample.
            with gathering(self.model):
                self._check(order[: min(2, self.batch_size)])
            work["entries"] = gather_texts(digest(first_entries(self.scored)))[0]
            self._work = work
        return self._work

    def _check(self, first: Sequence[int]) -> None:
        """Find out how to take samples, by forward passes over one or two of them."""
        loss, batch = self.loss, self.loss.small_batch(first)
        if loss.is_causal(batch):
            with frozen(self.model):
                require_causal(self.model, loss.collated(first[:1]))
        reason = why_no_rules(self.model, self.scored, batch)
        with frozen(self.model):
            own, padded = loss.differs(first[0]), False
            if reason is None and self.batch_size > 1:
                rows = uneven_rows(self.dataset, self.collate_fn, longest=FIRST if has_token_labels(batch) else None)
                padded = bool(padding_matters(self.model, self.collate_fn, rows))
            # Ranks agree, since rounding on different devices may decide a close comparison.
            loss.has_own, padded = map(bool, largest_of([own, padded]))
        reason = loss.why_own() or reason
        if reason is None and padded:
            reason = f"what {type(self.model).__name__} computes for a sample depends on how far its batch is padded"
        if reason is not None and rank_and_world()[0] == 0:
            log.warning("Fisher takes one sample per backward: %s", reason)
        self._by_rules = reason is None
        self._batches = Batches(self.batch_size if reason is None else 1)
        loss.choose(batch, self.scored)

    def _run(
        self,
        order: Sequence[int],
        sums: Sums,
        traces: Tensor | None,
        description: str,
        progress: bool,
        saved: SavedPass | None,
        boundaries: Collection[int] = (),
        at_boundary: Callable[[int], None] | None = None,
    ) -> None:
        self._results = _OnDevice()
        work = self.prepare(order)
        facts = {"order of samples": digest(list(order)), "sizes of sample sets": sorted(boundaries)}
        same_on_every_rank({**facts, "choice of traces": traces is not None, "pass": description})
        own_traces = torch.zeros(0 if traces is None else len(traces), dtype=torch.float64)
        state = PassState(own_traces, sums.tensors)
        sums.resume()
        if saved is not None:
            saved.load(state, {**work, **facts, "pass": description}, self.shapes, sums.layout)
        begin = 0
        with self._capturing(), bar(description, len(order), enabled=progress and rank_and_world()[0] == 0) as advance:
            advance(state.done, earlier=True)
            for stop in sorted({b for b in boundaries if 0 < b < len(order)} | {len(order)}):
                if state.stop < stop:
                    state.stop, state.left = stop, shard(order[begin:stop])
                begin = stop
                if state.stop > stop:
                    continue
                with nullcontext() if saved is None else deferred():
                    self._take_all(state, sums, order[0], advance, saved)
                if saved is not None and not sums.tensors:
                    saved.save(state)
                sums.complete()
                if stop in boundaries and at_boundary is not None:
                    at_boundary(stop)
                if stop < len(order):
                    sums.resume()
        taken = torch.tensor([state.taken])
        all_reduce_sum([taken])
        self.taken += int(taken)
        if traces is not None:
            all_reduce_sum([own_traces])
            traces += own_traces

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """The model ready for backward passes inside."""
        kind, trained = (Capture, None) if self._by_rules else (SampleCapture, self.scored)
        with gathering(self.model), torch.enable_grad(), frozen(self.model, trained):
            with kind(self.model, self.scored) as self._capture:
                yield
            self._capture = None

    def _take_all(self, state: PassState, sums: Sums, anyone: int, advance: Advance, saved: SavedPass | None) -> None:
        """Take this rank's samples of a segment, with as many backward passes as other ranks where that is needed."""
        world = rank_and_world()[1]
        partitioned = world > 1 and self.loss.partitioned
        in_step = partitioned or sums.in_step
        batches = self._batches
        batches.halves.clear()

        def turn() -> None:
            batch = batches.next(state.left)
            if batch is not None:
                advance(world * self._take(batch, sums, state))
            elif partitioned:
                self._backward(Batch([anyone]), sums, None, counted=False)
            elif in_step:
                self._send_nothing(sums, self.loss.passes)

        def missing() -> int:
            return min(BATCHES_BETWEEN, batches.missing(state.left))

        (turns,) = largest_of([missing()])
        while turns:
            # Ranks of a partitioned model agree inside a pass; a failure elsewhere is noticed by the watchdog.
            with nullcontext() if partitioned else failing_together():
                for left in reversed(range(turns)):
                    try:
                        turn()
                    except Exception:
                        if in_step and not partitioned:
                            self._send_nothing(sums, left * self.loss.passes)
                        raise
            with failing_together():
                self.loss.check_finite(*self._results.read(state.traces))
            facts = [saved is not None and saved.due(), saved is not None and wanted()]
            turns, busy, due, interrupted = largest_of([missing(), bool(batches.halves), *facts])
            if saved is not None and (due or interrupted) and not busy:
                saved.save(state)
                if interrupted:
                    raise KeyboardInterrupt

    def _take(self, batch: Batch, sums: Sums, state: PassState) -> int:
        """Deliver a batch's gradients, or halve the batch if it does not fit; returns the number of samples taken."""
        count = len(batch.indices)
        trace_B = torch.zeros(count, dtype=torch.float64, device=self.device) if len(state.traces) else None
        try:
            self._backward(batch, sums, trace_B)
            state.taken += self.loss.passes * count
        except Exception as error:
            from accelerate.utils.memory import should_reduce_batch_size

            if not should_reduce_batch_size(error):
                raise
            count = 0
            self._batches.halve(batch, error, may_halve=rank_and_world()[1] == 1 or not self.loss.partitioned)
        if trace_B is not None:
            # A halved batch has delivered some of its gradients.
            self._results.traces.append((batch.indices, trace_B))
        return count

    def _backward(self, batch: Batch, sums: Sums, trace_B: Tensor | None, *, counted: bool = True) -> None:
        """One forward pass and a backward pass for each loss; after a failure, other ranks still get their messages.

        Args:
            counted: whether the gradients are added; one that is not only keeps the ranks' collectives in step
        """
        capture, size, ended = self._capture, len(batch.indices), 0
        assert capture is not None

        def arrive(name: str, terms: list[Term]) -> None:
            if (ended, name) not in batch.delivered:
                batch.adding = True
                sums.arrive(name, terms if counted else [], trace_B)
                batch.adding = False
                batch.delivered.add((ended, name))

        try:
            losses = self.loss.of(batch.indices, lambda inputs: capture.forward(inputs, size))
            self._results.losses += [(batch.indices, loss_B.detach()) for loss_B in losses]
            for loss_B in losses:
                capture.backward(loss_B, arrive, retain_graph=ended + 1 < len(losses))
                sums.end_backward()
                ended += 1
        except Exception:
            if not self.loss.partitioned:
                self._send_nothing(sums, self.loss.passes - ended)
            raise

    @staticmethod
    def _send_nothing(sums: Sums, passes: int) -> None:
        for _ in range(passes):
            sums.end_backward()
