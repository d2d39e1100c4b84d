"""Passes over chosen samples that deliver each one's gradients: exact for batches where the rules allow it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Protocol

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
from irdscale.errors import InputError
from irdscale.fisher.capture import Capture, arrival_order, batch_size, frozen, why_no_rules
from irdscale.fisher.checkpoint import PassState, SavedPass
from irdscale.fisher.diagonal import Layout
from irdscale.fisher.losses import Objective, TokenReduction, loss_kind, objective_losses, reduced, sample_losses
from irdscale.fisher.quantized import QuantizedTerms
from irdscale.fisher.rules import Buffers, Dense, Term, add_traces
from irdscale.fisher.sums import Sums
from irdscale.models.batches import LateRows, shared_batches
from irdscale.models.checks import CLASSES, FIRST, loss_differs, padding_matters, require_causal, uneven_rows
from irdscale.models.chunked_losses import (
    PLACES,
    Headless,
    beginning,
    drawn_tokens,
    finishing,
    found_losses,
    headless,
    next_tokens,
    target_places,
)
from irdscale.utils.files import digest
from irdscale.utils.interrupts import deferred, wanted
from irdscale.utils.progress import Advance, bar
from irdscale.utils.quantized import is_quantized

log = logging.getLogger(__name__)

# Batches between two moments in which losses and traces are read from the device, and ranks hear of errors.
BATCHES_BETWEEN = 16
# Samples and entries of each parameter by which ranks, or a run and its continuation, are compared.
COMPARED_SAMPLES = 8
COMPARED_ENTRIES = 64


class SizedDataset(Protocol):
    """Anything with a length and rows, such as a datasets.Dataset or a list."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> Any: ...


Collate = Callable[[list[Any]], dict[str, Any]]
Arrived = Callable[[str, list[Term]], None]


class Sink(Protocol):
    """What takes a pass's gradients; `in_step` says that all ranks must make the same number of backward passes."""

    @property
    def in_step(self) -> bool: ...
    def arrive(self, name: str, terms: list[Term], trace_B: Tensor) -> None: ...
    def end_backward(self) -> None: ...


@dataclass
class _SumsSink:
    sums: Sums
    traced: bool

    @property
    def in_step(self) -> bool:
        return self.sums.in_step

    def arrive(self, name: str, terms: list[Term], trace_B: Tensor) -> None:
        self.sums.arrive(name, terms, trace_B if self.traced else None)

    def end_backward(self) -> None:
        self.sums.end_backward()


@dataclass
class _TraceSink:
    shapes: dict[str, tuple[int, ...]]
    buffers: Buffers
    in_step: bool = False

    def arrive(self, name: str, terms: list[Term], trace_B: Tensor) -> None:
        if terms:
            add_traces(terms, torch.Size(self.shapes[name]), trace_B, self.buffers)

    def end_backward(self) -> None:
        self.buffers.forget()


@dataclass
class _Batch:
    """Samples to take, and what an attempt that ran out of memory has delivered of them: (backward pass, name)."""

    indices: list[int]
    delivered: set[tuple[int, str]] = field(default_factory=set)


@dataclass
class _Unread:
    """What is on the device and was not read yet: (samples, their losses) and (samples, their traces)."""

    losses: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)
    traces: list[tuple[Sequence[int], Tensor]] = field(default_factory=list)


@dataclass
class SampleGradients:
    """One model and data set, ready for passes over chosen samples.

    A pass is exact for batches by the rules of `irdscale.fisher.rules` where `why_no_rules` finds nothing against
    them, and takes one sample per backward otherwise, which the log says; so too where the padding of a batch changes
    what a sample contributes, and where the model's own loss is another than that of its logits, whose place it takes.
    A batch that does not fit in memory is halved, and all that follow, which the log says too.

    Attributes:
        taken: gradients of single samples taken so far, by all ranks.
        fitting: samples in a batch after the halvings so far; 0 before the first pass.
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
    fitting: int = 0
    _work: dict[str, Any] | None = None
    _group: object = None
    _reason: str | None = None
    _passes: int = 1
    _headless: Headless | None = None
    _has_own_loss: bool = False
    _arriving: bool = False
    _partitioned: bool = False
    _capture: Capture | None = None
    _buffers: Buffers = field(default_factory=Buffers)
    _unread: _Unread = field(default_factory=_Unread)

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """name -> shape of every scored parameter."""
        return {name: shape_of(p) for name, p in self.scored.items()}

    @property
    def device(self) -> torch.device:
        """Where the model computes."""
        return device_of(self.model)

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
        """Add each ordered sample's terms to `sums`, and its squared gradient to its entry of `traces` [N] if given.

        `at_boundary(s)` is called when exactly the first s samples are in the sums; no batch crosses a boundary. With
        several ranks each takes its share of the samples, and all end with the sums complete.

        Args:
            saved: keeps the state of the pass now and then, and when a signal interrupts it, which then raises
                KeyboardInterrupt; one that was interrupted goes on from there.
        """
        with watched():
            sink = _SumsSink(sums, traces is not None)
            self._run(order, sink, sums, traces, boundaries, at_boundary, progress, description, saved)

    def add_traces(
        self, order: Sequence[int], traces: Tensor, *, progress: bool = False, saved: SavedPass | None = None
    ) -> None:
        """Add the squared gradient norm of each ordered sample to its entry of `traces` (float64 [N])."""
        with watched():
            sink = _TraceSink(self.shapes, self._buffers)
            self._run(order, sink, None, traces, (), None, progress, "Sample traces", saved)

    def label_losses(self, lengths: Sequence[int]) -> Tensor:
        """The loss of every sample by its own label, float64 [N], whatever the objective; forward passes alone.

        With several ranks each takes its share of the batches, and all get every loss.

        Args:
            lengths: of the samples; those of like lengths share a batch.

        Raises:
            InputError: what `prepare` refuses, or a sample's loss is not finite (named).
        """
        self.prepare(range(len(self.dataset)))
        by_label = replace(self, objective="label")
        losses_N = torch.zeros(len(self.dataset), dtype=torch.float64)
        found = LateRows(losses_N)

        def measure(places: list[int]) -> None:
            taken = places or [0]
            with self._agree():
                batch = by_label._placed_batch(taken)
            (loss_B,) = by_label._losses(lambda inputs: self.model(**inputs), batch, taken)
            if places:
                found.add(places, loss_B)

        # Ranks whose batches were halved have smaller ones; all must cut the samples alike.
        fitting = 1 if self._has_own_loss else -largest_of([-self.fitting])[0]
        # Ranks of a partitioned model agree inside a pass.
        agreeing = nullcontext() if self._partitioned else failing_together()
        with watched(), gathering(self.model), frozen(self.model), torch.no_grad(), agreeing:
            shared_batches(self.model, lengths, fitting, measure)
            found.read()
        all_reduce_sum([losses_N])
        self._refuse_not_finite(range(len(losses_N)), losses_N)
        return losses_N

    def arrival_order(self, index: int) -> list[str]:
        """The scored names in the order in which a backward pass delivers them, the same on every rank."""
        with gathering(self.model):
            names = arrival_order(self.model, self.scored, self._first_tokens(self._batch([index])))
        return gather_texts("\n".join(names))[0].split("\n")

    def prepare(self, order: Sequence[int]) -> dict[str, Any]:
        """Check, once in a process group, that all ranks were given the same work, and whether the rules are exact.

        Returns:
            What identifies the work.

        Raises:
            InputError: a rank was given other work, a sample has no labels, a language model sees its targets, or
                `token_reduction` is another than that of the model's own loss.
        """
        group = current_group()
        if self._work is None or self._group is not group:
            self._group = group
            self._partitioned = is_partitioned(self.model)
            with failing_together():
                work = self._describe()
            same_on_every_rank(work)
            # Two samples show whether batches are safe, even where the first batch is of one.
            with gathering(self.model):
                self._check(order[: min(2, self.batch_size)])
            work["entries"] = gather_texts(digest(self._first_entries()))[0]
            self._work = work
        return self._work

    def _describe(self) -> dict[str, Any]:
        """What must be the same on every rank; of the samples, their number and some that are spread over them."""
        parameters = [[name, list(shape_of(p)), str(p.dtype)] for name, p in self.scored.items()]
        entries = [] if self._partitioned else self._first_entries()
        count = len(self.dataset)
        some = [count * i // COMPARED_SAMPLES for i in range(COMPARED_SAMPLES)] + [count - 1]
        rows = [sorted(self._batch([i]).items()) for i in dict.fromkeys(some)]
        values = [[k, str(v.tolist() if isinstance(v, Tensor) else v)] for row in rows for k, v in row]
        return {
            "number of samples": len(self.dataset),
            "data set": digest(values),
            "model": digest([parameters, entries]),
            "objective": f"{self.objective}, {self.token_reduction}, seed {self.seed}",
            "batch size": self.batch_size,
        }

    def _first_entries(self) -> list[list[float]]:
        """Some of each parameter's entries, from this rank's part of a partitioned one."""
        parts = [getattr(p, "ds_tensor", p).detach().reshape(-1)[:COMPARED_ENTRIES] for p in self.scored.values()]
        # As bits: a NaN is a number like any other here.
        return [part.double().cpu().view(torch.int64).tolist() for part in parts]

    @staticmethod
    def _first_tokens(batch: dict[str, Any]) -> dict[str, Any]:
        """A batch of texts cut short, so that the logits of all its tokens fit in memory; any other as it is."""
        return beginning(batch) if _is_of_texts(batch) else batch

    def _check(self, first: Sequence[int]) -> None:
        """Find out how to take samples, by small forward passes.

        Args:
            first: one or two of the samples.
        """
        batch = self._first_tokens(self._batch(first))
        is_causal = _is_of_texts(batch) and (
            loss_kind(self.model, batch["input_ids"].unsqueeze(2), batch["labels"]) == "causal-lm"
        )
        if is_causal:
            with frozen(self.model):
                require_causal(self.model, self._collated(first[:1]))
        try:
            self._reason = why_no_rules(self.model, self.scored, batch)
        except RuntimeError as error:
            if not self._partitioned:
                raise
            # DeepSpeed gathers what a module itself holds; it cannot know of a parent that reaches into a child.
            raise InputError(
                f"{type(self.model).__name__}: cannot run in ZeRO-3 partitions: {str(error).splitlines()[0]}; expected "
                f"a model whose modules read no parameters but their own"
            ) from error
        with frozen(self.model):
            # Small differences may be rounded to either side on other devices.
            self._has_own_loss, matters = map(
                bool, largest_of([self._loss_differs(first), self._padding_matters(batch)])
            )
        name = type(self.model).__name__
        if self._has_own_loss and self.objective == "label":
            self._reason = (
                f"the own loss of {name} is not the negative log-likelihood of its logits (class weights, auxiliary "
                f"losses); its own is taken"
            )
            if self.token_reduction == "sum":
                raise InputError(
                    f"fisher.token_reduction: found 'sum'; expected 'mean' for {name}, whose own loss is not that of "
                    f"its logits"
                )
        elif self._has_own_loss and rank_and_world()[0] == 0:
            log.warning(
                "fisher.objective: '%s' takes the likelihood of the logits of %s, and leaves out what else its own "
                "loss has",
                self.objective,
                name,
            )
        if self._reason is None and matters:
            self._reason = f"what {name} makes of a sample depends on how far its batch is padded"
        self.fitting = self.batch_size if self._reason is None else 1
        if self._reason is not None and rank_and_world()[0] == 0:
            log.warning("Fisher takes one sample per backward: %s", self._reason)
        self._headless = None
        if is_causal and not self._has_own_loss:
            with frozen(self.model):
                parts = headless(self.model, batch)
            scored = {id(p) for p in self.scored.values()}
            # A head that is scored is told what comes back to it for all tokens together.
            if parts is not None and not any(id(p) in scored for p in parts.head.parameters()):
                self._headless = parts
        if self.objective == "expected":
            with frozen(self.model), torch.no_grad():
                self._passes = _logits(self.model(**_inputs(batch))).reshape(batch_size(batch), -1).shape[1]

    def _padding_matters(self, batch: dict[str, Any]) -> bool:
        if self.batch_size == 1 or self._reason is not None:
            return False
        rows = uneven_rows(self.dataset, self.collate_fn, longest=FIRST if _is_of_texts(batch) else None)
        return bool(padding_matters(self.model, self.collate_fn, rows))

    def _loss_differs(self, first: Sequence[int]) -> bool:
        """Whether the model's own `.loss` of a batch of one is another, for the labels of the data or any class."""
        count = len(self.dataset)
        for place, index in enumerate(dict.fromkeys([first[0], count // 3, 2 * count // 3, count - 1])):
            batch = self._collated([index])
            if not isinstance(batch.get("labels"), Tensor):
                return False
            for labels in [batch["labels"], *(() if place else _classes_to_try(self.model, batch["labels"]))]:
                tried = {**batch, "labels": labels}
                if all(loss_differs(self.model, tried, self._loss_by(r)) for r in {"mean", self.token_reduction}):
                    return True
        return False

    def _loss_by(self, token_reduction: TokenReduction) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda logits, labels: sample_losses(
            loss_kind(self.model, logits, labels), logits, labels, token_reduction
        )

    def _run(
        self,
        order: Sequence[int],
        sink: Sink,
        sums: Sums | None,
        traces: Tensor | None,
        boundaries: Collection[int],
        at_boundary: Callable[[int], None] | None,
        progress: bool,
        description: str,
        saved: SavedPass | None,
    ) -> None:
        self._unread = _Unread()
        work = self.prepare(order)
        asked = {"order of samples": digest(list(order)), "sizes of sample sets": sorted(boundaries)}
        same_on_every_rank({**asked, "wish for traces": traces is not None, "pass": description})
        own_traces = torch.zeros(0 if traces is None else len(traces), dtype=torch.float64)
        state = PassState(own_traces, {} if sums is None else sums.tensors)
        if sums is not None:
            sums.go_on()
        if saved is not None:
            layout: Layout = "replicated" if sums is None else sums.layout
            saved.load(state, {**work, **asked, "pass": description}, self.shapes, layout)
        begin = 0
        with (
            self._capturing(),
            bar(description, len(order), enabled=progress and rank_and_world()[0] == 0) as advance,
        ):
            advance(state.done, earlier=True)
            for stop in sorted({b for b in boundaries if 0 < b < len(order)} | {len(order)}):
                if state.stop < stop:
                    state.stop, state.left = stop, shard(order[begin:stop])
                begin = stop
                if state.stop > stop:
                    continue
                with nullcontext() if saved is None else deferred():
                    self._take_all(state, sink, order[0], advance, saved)
                if saved is not None and sums is None:
                    saved.save(state)
                if sums is not None:
                    sums.complete()
                if stop in boundaries and at_boundary is not None:
                    at_boundary(stop)
                if sums is not None and stop < len(order):
                    sums.go_on()
        taken = torch.tensor([state.taken])
        all_reduce_sum([taken])
        self.taken += int(taken)
        if traces is not None:
            all_reduce_sum([own_traces])
            traces += own_traces

    @contextmanager
    def _capturing(self) -> Iterator[None]:
        """The model made ready for backward passes, by the rules or sample by sample."""
        with gathering(self.model), torch.enable_grad():
            if self._reason is not None:
                yield
                return
            with frozen(self.model), Capture(self.model, self.scored) as self._capture:
                yield
            self._capture = None

    def _take_all(self, state: PassState, sink: Sink, anyone: int, advance: Advance, saved: SavedPass | None) -> None:
        """Take this rank's samples of a segment; in step with the others where the sink or the model asks for it."""
        world = rank_and_world()[1]
        partitioned = world > 1 and self._partitioned
        in_step = partitioned or sink.in_step
        again: list[_Batch] = []

        def turn() -> None:
            if again:
                batch = again.pop()
            elif state.left:
                batch = _Batch(state.left[: self.fitting])
                del state.left[: self.fitting]
            elif partitioned:
                self._backward(_Batch([anyone]), _Nothing(sink), torch.zeros(1, dtype=torch.float64))
                return
            else:
                if in_step:
                    self._send_nothing(sink, self._passes)
                return
            again.extend(self._take(batch, sink, state))
            advance(world * len(batch.indices))

        def missing() -> int:
            return min(BATCHES_BETWEEN, len(again) + -(-len(state.left) // self.fitting))

        (turns,) = largest_of([missing()])
        while turns:
            # Ranks of a partitioned model agree inside a pass; one that fails elsewhere ends alone, and is noticed.
            with nullcontext() if partitioned else failing_together():
                for left in reversed(range(turns)):
                    try:
                        turn()
                    except Exception:
                        if in_step and not partitioned:
                            self._send_nothing(sink, left * self._passes)
                        raise
            with failing_together():
                self._read(state)
            asked = [saved is not None and saved.due(), saved is not None and wanted()]
            turns, busy, due, interrupted = largest_of([missing(), bool(again), *asked])
            if saved is not None and (due or interrupted) and not busy:
                saved.save(state)
                if interrupted:
                    raise KeyboardInterrupt

    def _take(self, batch: _Batch, sink: Sink, state: PassState) -> list[_Batch]:
        """Deliver a batch's gradients; if it does not fit in memory, returns its halves."""
        trace_B = torch.zeros(len(batch.indices), dtype=torch.float64, device=self.device)
        halves: list[_Batch] = []
        try:
            self._backward(batch, sink, trace_B)
        except Exception as error:
            from accelerate.utils.memory import should_reduce_batch_size

            if not should_reduce_batch_size(error):
                raise
            halves = self._halves(batch, error)
        if len(state.traces):
            self._unread.traces.append((batch.indices, trace_B))
        if not halves:
            state.taken += self._passes * len(batch.indices)
        return halves

    def _read(self, state: PassState) -> None:
        """Read the losses and traces of the batches since the last time: what waits for the device, once for all.

        Raises:
            InputError: a loss is not finite; names the sample.
        """
        losses, traces = self._unread.losses, self._unread.traces
        if not losses and not traces:
            return
        flat = [loss_B.double() for _, loss_B in losses] + [trace_B for _, trace_B in traces]
        try:
            found = torch.cat(flat).cpu()
            count = sum(len(indices) for indices, _ in losses)
            self._refuse_not_finite([i for indices, _ in losses for i in indices], found[:count])
            if traces:
                places = torch.tensor([i for indices, _ in traces for i in indices])
                state.traces.index_add_(0, places, found[count:])
        finally:
            losses.clear()
            traces.clear()

    def _halves(self, batch: _Batch, error: Exception) -> list[_Batch]:
        size = len(batch.indices)
        apart = rank_and_world()[1] > 1 and self._partitioned
        if size == 1 or self._arriving or apart:
            raise InputError(
                f"fisher.batch_size: a batch of {size} does not fit in memory; expected a smaller one, "
                f"shorter samples, or more ranks with layout 'sharded'"
            ) from error
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        if self.fitting > size // 2:
            self.fitting = size // 2
            log.warning("fisher.batch_size: %d does not fit in memory; going on with %d", size, self.fitting)
        parts = (batch.indices[: size // 2], batch.indices[size // 2 :])
        return [_Batch(part, set(batch.delivered)) for part in parts]

    def _backward(self, batch: _Batch, sink: Sink, trace_B: Tensor) -> None:
        """One forward, and a backward pass for each loss; what fails in step still sends what the others wait for."""
        ended = 0

        def arrive(name: str, terms: list[Term]) -> None:
            if (ended, name) not in batch.delivered:
                self._arriving = True
                sink.arrive(name, terms, trace_B)
                self._arriving = False
                batch.delivered.add((ended, name))

        def end() -> None:
            nonlocal ended
            sink.end_backward()
            ended += 1

        self._arriving = False
        try:
            if self._reason is None:
                self._by_rules(batch.indices, arrive, end)
            else:
                self._one(batch.indices[0], arrive, end)
        except Exception:
            if not self._partitioned:
                self._send_nothing(sink, self._passes - ended)
            raise

    @staticmethod
    def _send_nothing(sink: Sink, passes: int) -> None:
        for _ in range(passes):
            sink.end_backward()

    def _agree(self) -> AbstractContextManager[None]:
        """Before ranks gather parameters together, they hear of what went wrong on one."""
        return failing_together() if self._partitioned else nullcontext()

    def _by_rules(self, indices: Sequence[int], arrive: Arrived, end: Callable[[], None]) -> None:
        with self._agree():
            batch = self._placed_batch(indices)
        capture = self._capture
        assert capture is not None
        losses = self._losses(lambda inputs: capture.forward(inputs, batch_size(batch)), batch, indices)
        self._unread.losses += [(indices, loss_B.detach()) for loss_B in losses]
        for i, loss_B in enumerate(losses):
            capture.backward(loss_B, arrive, retain_graph=i + 1 < len(losses))
            end()

    def _one(self, index: int, arrive: Arrived, end: Callable[[], None]) -> None:
        """A sample's own backward pass; each gradient is delivered, and dropped, as soon as it is whole."""
        with self._agree():
            batch = self._placed_batch([index])

        def deliver(name: str, parameter: nn.Parameter) -> None:
            assert parameter.grad is not None
            gradient, parameter.grad = parameter.grad, None
            with torch.no_grad():
                arrive(name, [Dense(gradient.unsqueeze(0))])

        with frozen(self.model, self.scored), torch.enable_grad(), ExitStack() as cleaning:
            quantized = cleaning.enter_context(QuantizedTerms(self.model, self.scored, arrive))
            for name, parameter in self.scored.items():
                if is_quantized(parameter):
                    continue
                cleaning.callback(setattr, parameter, "grad", parameter.grad)
                parameter.grad = None
                handle = parameter.register_post_accumulate_grad_hook(partial(deliver, name))
                cleaning.callback(handle.remove)
            losses = self._losses(lambda inputs: self.model(**inputs), batch, [index])
            self._unread.losses += [([index], loss_1.detach()) for loss_1 in losses]
            for i, loss_1 in enumerate(losses):
                quantized.begin()
                if loss_1.requires_grad:
                    loss_1.sum().backward(retain_graph=i + 1 < len(losses))
                quantized.end()
                end()

    def _batch(self, indices: Sequence[int]) -> dict[str, Any]:
        return self._moved(self._collated(indices))

    def _placed_batch(self, indices: Sequence[int]) -> dict[str, Any]:
        """A batch that `_losses` takes; of texts with the places of their targets, counted before they are moved."""
        batch = self._collated(indices)
        if self._headless is not None:
            batch = {**batch, PLACES: target_places(batch["labels"])}
        return self._moved(batch)

    def _collated(self, indices: Sequence[int]) -> dict[str, Any]:
        batch = self.collate_fn([self.dataset[i] for i in indices])
        if "labels" not in batch and self.objective == "label":
            raise InputError(f"sample {indices[0]}: found no labels; expected them for fisher.objective 'label'")
        return batch

    def _moved(self, batch: dict[str, Any]) -> dict[str, Any]:
        device = self.device
        # A copy that blocks waits for all that runs on the device.
        return {k: v.to(device, non_blocking=True) if isinstance(v, Tensor) else v for k, v in batch.items()}

    def _losses(
        self, forward: Callable[[dict[str, Any]], Any], batch: dict[str, Any], indices: Sequence[int]
    ) -> list[Tensor]:
        """The losses [B] of one forward pass, one for each backward pass that the objective takes."""
        if self._has_own_loss and self.objective == "label":
            # It may be no mean over samples, and so is taken of one at a time.
            assert len(indices) == 1
            return [forward(batch).loss.reshape(1)]
        if self._headless is not None:
            with finishing(self.model, self._headless, partial(self._text_losses, self._headless, batch, indices)):
                return [forward(_inputs(batch))]
        logits, labels = _logits(forward(_inputs(batch))), batch.get("labels")
        with self._agree():
            kind = loss_kind(self.model, logits, logits.new_zeros(len(logits)) if labels is None else labels)
            reduction = self.token_reduction
            return list(objective_losses(self.objective, kind, logits, labels, indices, self.seed, reduction))

    def _text_losses(
        self, parts: Headless, batch: dict[str, Any], indices: Sequence[int], hidden_BTD: Tensor
    ) -> Tensor:
        labels = batch["labels"]
        if self.objective == "sampled":
            labels = drawn_tokens(parts.head, hidden_BTD, labels, indices, self.seed)
        losses_BT = found_losses(parts.head, hidden_BTD, next_tokens(labels), batch[PLACES])
        return reduced(losses_BT, labels, self.token_reduction)

    def _refuse_not_finite(self, indices: Sequence[int], losses_N: Tensor) -> None:
        bad = (~losses_N.isfinite()).nonzero().flatten().tolist()
        if bad:
            row = self.dataset[indices[bad[0]]]
            row = f" (row {row['row']} of its split)" if isinstance(row, dict) and "row" in row else ""
            raise InputError(
                f"sample {indices[bad[0]]}{row}: found a loss of {losses_N[bad[0]].item()}; expected a finite number"
            )


@dataclass
class _Nothing:
    """Takes a pass that is made only because other ranks gather parameters in theirs.

    It counts for nothing, but the collectives of all ranks must come in the same order.
    """

    sink: Sink
    in_step: bool = True

    def arrive(self, name: str, terms: list[Term], trace_B: Tensor) -> None:
        self.sink.arrive(name, [], trace_B)

    def end_backward(self) -> None:
        self.sink.end_backward()


def _is_of_texts(batch: dict[str, Any]) -> bool:
    """Whether each token has a label."""
    labels, tokens = batch.get("labels"), batch.get("input_ids")
    return isinstance(labels, Tensor) and isinstance(tokens, Tensor) and labels.dim() == 2 == tokens.dim()


def _classes_to_try(model: nn.Module, labels: Tensor) -> list[Tensor]:
    """Of a classifier, some classes as labels of a sample: its loss may weigh each of them by its own."""
    classes = getattr(getattr(model, "config", None), "num_labels", 1)
    if labels.dim() != 1 or labels.is_floating_point() or classes == 1:
        return []
    count = min(classes, CLASSES)
    return [torch.full_like(labels, classes * i // count) for i in range(count)]


def _inputs(batch: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in batch.items() if key not in ("labels", PLACES)}


def _logits(output: Any) -> Tensor:
    logits = output.logits if hasattr(output, "logits") else output
    if not isinstance(logits, Tensor):
        raise InputError(f"the model's output is {type(output).__name__}; expected one with logits")
    return logits
