"""Fisher and trace passes against a plain forward+backward, FISH's loop, Kronfluence, more ranks, and torch.topk.

A measured pass has `PASS_BATCHES` batches, and so has everything that it is compared with: in a real pass of hundreds
of batches, the work done once per pass and the cold first batch do not matter.
"""

from __future__ import annotations

import importlib.util
import logging
import tempfile
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.bench.models import BATCH, collate, make_model, make_rows
from irdscale.bench.timing import row, side_by_side
from irdscale.fisher import Fisher, SampleGradients, scored_parameters
from irdscale.fisher.accumulate import new_sums
from irdscale.masks.mask import top_k

log = logging.getLogger(__name__)

MODELS = ("bert", "gpt2", "llama")
REPEATS = 9
PASS_BATCHES = 3
PASS_BARS = {128: 1.08, 32: 1.22}
LOOP_BARS = {128: 1.1, 32: 1.8}
TRACE_BARS = {128: 0.9, 32: 0.8}
KRONFLUENCE_BAR = 1.5
KRONFLUENCE_SAMPLES = 16
RANKS_BAR = 1.8
RANKS_SAMPLES = 32
TOPK_BAR = 1.5
TOPK_ENTRIES, TOPK_K = 10**8, 500_000


def bench_fisher(advance: Callable[..., None]) -> list[dict[str, Any]]:
    """All rows; a comparison that is impossible here is logged and skipped."""
    rows: list[dict[str, Any]] = []
    for name in MODELS:
        model = make_model(name)
        for tokens in (128, 32):
            rows += _passes(name, model, tokens)
            advance()
    for measure in (_kronfluence, _ranks, _top_k):
        rows += measure()
        advance()
    return rows


def _passes(name: str, model: Any, tokens: int) -> list[dict[str, Any]]:
    data = make_rows(tokens, PASS_BATCHES * BATCH)
    batches = [collate(data[first : first + BATCH]) for first in range(0, len(data), BATCH)]
    order = range(len(data))
    samples = SampleGradients(model, data, collate, scored_parameters(model), batch_size=BATCH)
    sums = new_sums(samples, order)
    traces = torch.zeros(len(data), dtype=torch.float64)

    def plain() -> None:
        for batch in batches:
            model(**batch).loss.backward()
            # Here, so that the gradients take no memory in the next measurement.
            model.zero_grad(set_to_none=True)

    def one_sample_loop() -> None:
        for sample in data:
            model(**collate([sample])).loss.backward()
            for parameter_name, parameter in model.named_parameters():
                if parameter.grad is not None:
                    sums.tensors[parameter_name].addcmul_(parameter.grad, parameter.grad)
            model.zero_grad(set_to_none=True)

    measured = {
        "plain": plain,
        "fisher": lambda: samples.accumulate(order, sums),
        "trace": lambda: samples.add_traces(order, traces),
        "loop": one_sample_loop,
    }
    seconds = side_by_side(measured, REPEATS)
    what = "Fisher pass / plain forward+backward"
    rows = [row("fisher", what, name, tokens, seconds, "fisher", "plain", limit=PASS_BARS[tokens])]
    what = "one-sample loop (FISH) / Fisher pass"
    rows.append(row("fisher", what, name, tokens, seconds, "loop", "fisher", at_least=LOOP_BARS[tokens]))
    what = "trace pass / plain forward+backward"
    rows.append(row("fisher", what, name, tokens, seconds, "trace", "plain", limit=TRACE_BARS[tokens]))
    return rows


def _kronfluence() -> list[dict[str, Any]]:
    """Kronfluence's diagonal for the same linear layers and samples; it also writes the result to a file."""
    if importlib.util.find_spec("kronfluence") is None:
        log.info("bench: no kronfluence, so no comparison (pip install --no-deps kronfluence einconv opt_einsum)")
        return []
    from kronfluence.analyzer import Analyzer, prepare_model
    from kronfluence.arguments import FactorArguments
    from kronfluence.task import Task

    linear = [name for name, module in make_model("bert").named_modules() if isinstance(module, nn.Linear)]

    class Classification(Task):
        def compute_train_loss(self, batch: Any, model: Any, sample: bool = False) -> Tensor:
            inputs = {key: value for key, value in batch.items() if key != "labels"}
            return nn.functional.cross_entropy(model(**inputs).logits, batch["labels"], reduction="sum")

        def compute_measurement(self, batch: Any, model: Any) -> Tensor:
            return self.compute_train_loss(batch, model)

        def get_influence_tracked_modules(self) -> list[str]:
            return linear

        def get_attention_mask(self, batch: Any) -> Tensor:
            mask: Tensor = batch["attention_mask"]
            return mask

    model, tokens, data = make_model("bert"), 128, make_rows(128, KRONFLUENCE_SAMPLES)
    order = range(len(data))
    layers = [f"^{name}[.]".replace(".", "[.]", name.count(".")) for name in linear]
    samples = SampleGradients(model, data, collate, scored_parameters(model, layers), batch_size=BATCH)
    rows = [{key: value[0] for key, value in collate([sample]).items()} for sample in data]
    arguments = FactorArguments(strategy="diagonal", use_empirical_fisher=True)
    with tempfile.TemporaryDirectory() as folder:
        task, level = Classification(), logging.root.level
        wrapped = prepare_model(make_model("bert"), task)
        options: dict[str, Any] = {"cpu": True, "output_dir": folder, "disable_tqdm": True, "log_level": logging.ERROR}
        analyzer = Analyzer("bench", wrapped, task, **options)
        # Kronfluence has set the root logger's level.
        logging.root.setLevel(level)

        def theirs() -> None:
            analyzer.fit_lambda_matrices("diagonal", rows, BATCH, factor_args=arguments, overwrite_output_dir=True)

        def ours() -> None:
            samples.accumulate(order, new_sums(samples, order))

        seconds = side_by_side({"kronfluence": theirs, "fisher": ours}, max(2, REPEATS // 3))
        sums = new_sums(samples, order)
        samples.accumulate(order, sums)
        _check_same(sums.tensors, analyzer.load_lambda_matrices("diagonal")["lambda_matrix"])
    what = "Kronfluence, diagonal strategy / Fisher pass"
    return [row("fisher", what, "bert", tokens, seconds, "kronfluence", "fisher", at_least=KRONFLUENCE_BAR)]


def _check_same(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    for name, matrix in theirs.items():
        # Kronfluence's last column is the bias.
        torch.testing.assert_close(ours[f"{name}.weight"], matrix[:, :-1], rtol=1e-3, atol=1e-5 * float(matrix.max()))


def _ranks() -> list[dict[str, Any]]:
    """The same samples on one rank of one thread, and on two ranks: timed alternately in the same two processes."""
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder:
        mp.spawn(_on_rank, args=(folder, REPEATS, RANKS_SAMPLES), nprocs=2)
        lines = (Path(folder) / "seconds").read_text().split()
    seconds = {"one": [float(x) for x in lines[::2]], "two": [float(x) for x in lines[1::2]]}
    return [row("fisher", "1 rank / 2 ranks of one thread", "bert", 128, seconds, "one", "two", at_least=RANKS_BAR)]


def _on_rank(rank: int, folder: str, repeats: int, count: int) -> None:
    import torch.distributed as dist

    torch.set_num_threads(1)
    model, data = make_model("bert"), make_rows(128, count)
    order = range(count)
    samples = SampleGradients(model, data, collate, scored_parameters(model), batch_size=BATCH)
    sums = new_sums(samples, order)
    lines = []
    for repeat in range(repeats + 1):
        one = two = 0.0
        if rank == 0:
            # Rank 1 waits for this rank to join, without using the CPU.
            one = _seconds(lambda: samples.accumulate(order, sums))
        store, patience = f"file://{folder}/store-{repeat}", timedelta(minutes=30)
        dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=patience)
        # Warms up work done once per process group, such as the heartbeats.
        samples.accumulate(order[:2], sums)
        two = _seconds(lambda: samples.accumulate(order, sums))
        dist.destroy_process_group()
        if repeat:
            lines.append(f"{one} {two}")
    if rank == 0:
        (Path(folder) / "seconds").write_text("\n".join(lines))


def _seconds(work: Callable[[], None]) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def _top_k() -> list[dict[str, Any]]:
    scores = torch.rand(TOPK_ENTRIES, generator=torch.Generator().manual_seed(0)).pow_(8)
    fisher = Fisher({"scores": scores}, torch.zeros(0, dtype=torch.float64))
    measured = {"torch": lambda: torch.topk(scores, TOPK_K), "ours": lambda: top_k(fisher, TOPK_K)}
    seconds = side_by_side(measured, max(2, REPEATS // 3))
    what = f"torch.topk / top_k, k = {TOPK_K:,}"
    return [row("fisher", what, f"{TOPK_ENTRIES:,} entries", 0, seconds, "torch", "ours", at_least=TOPK_BAR)]
