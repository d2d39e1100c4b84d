"""A sparse training step under DeepSpeed ZeRO-2 against the same under DDP, on two ranks of one thread."""

from __future__ import annotations

import importlib.util
import logging
import os
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch

from irdscale.bench.models import collate, fisher_mask, make_rows, sparse_model
from irdscale.bench.timing import row, side_by_side
from irdscale.distributed.deepspeed import compile_nothing
from irdscale.distributed.ranks import end_rank

log = logging.getLogger(__name__)

BAR = 1.05
REPEATS = 9
TOKENS = 128
# As configs/deepspeed/zero2.json.
ZERO = {
    "train_micro_batch_size_per_gpu": 1,
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {
        "stage": 2,
        "reduce_bucket_size": 50_000_000,
        "allgather_bucket_size": 50_000_000,
        "overlap_comm": True,
        "contiguous_gradients": True,
    },
}


def bench_zero() -> list[dict[str, Any]]:
    """The row; none, with a log line, if DeepSpeed is missing."""
    if importlib.util.find_spec("deepspeed") is None:
        log.info("bench: no deepspeed, so ZeRO-2 is not compared with DDP")
        return []
    import torch.multiprocessing as mp

    with tempfile.TemporaryDirectory() as folder, _quiet_stdout():
        mp.spawn(_on_rank, args=(folder, REPEATS), nprocs=2)
        lines = (Path(folder) / "seconds").read_text().split()
    seconds = {"zero": [float(x) for x in lines[::2]], "ddp": [float(x) for x in lines[1::2]]}
    what = "sparse step under ZeRO-2 / under DDP, 2 ranks"
    return [row("train", what, "bert", TOKENS, seconds, "zero", "ddp", limit=BAR)]


@contextmanager
def _quiet_stdout() -> Iterator[None]:
    """Redirect stdout of processes started in the body to stderr: DeepSpeed logs to stdout when it is imported."""
    sys.stdout.flush()
    own = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        os.dup2(own, 1)
        os.close(own)


def _on_rank(rank: int, folder: str, repeats: int) -> None:
    import deepspeed
    import torch.distributed as dist
    from torch.nn.parallel import DistributedDataParallel

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "LOCAL_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29400"}
    store = f"file://{folder}/store"
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=2, timeout=timedelta(minutes=10))
    compile_nothing()
    deepspeed.init_distributed("gloo")
    batch = collate(make_rows(TOKENS, seed=rank))
    mask = fisher_mask("bert", make_rows(TOKENS))
    ddp = DistributedDataParallel(sparse_model("bert", mask))
    ddp_optimizer = torch.optim.AdamW([p for p in ddp.parameters() if p.requires_grad], lr=1e-5)
    inside = sparse_model("bert", mask)
    optimizer = torch.optim.AdamW([p for p in inside.parameters() if p.requires_grad], lr=1e-5)
    engine = deepspeed.initialize(model=inside, optimizer=optimizer, config=ZERO)[0]

    def ddp_step() -> None:
        ddp_optimizer.zero_grad(set_to_none=True)
        ddp(**batch).loss.backward()
        ddp_optimizer.step()

    def zero_step() -> None:
        engine.backward(engine(**batch).loss)
        engine.step()

    seconds = side_by_side({"zero": zero_step, "ddp": ddp_step}, repeats)
    if rank == 0:
        lines = [f"{zero} {ddp_s}" for zero, ddp_s in zip(seconds["zero"], seconds["ddp"], strict=True)]
        (Path(folder) / "seconds").write_text("\n".join(lines))
    end_rank()
