"""The models of the GPU's benchmarks: random Llamas in bfloat16, as wide as those of 1B and 8B parameters."""

from __future__ import annotations

import copy
import gc
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from irdscale.bench.models import collate

DEVICE = "cuda"
TOKENS = 512
# The decoder's matrices, which are scored and masked.
MATRICES = r"\.layers\.\d+\..*_proj\.weight$"


@dataclass(frozen=True)
class Size:
    """Widths of a Llama, and samples per batch."""

    hidden: int
    mlp: int
    layers: int
    heads: int
    batch: int = 8
    key_value_heads: int = 8
    vocabulary: int = 128_256

    @property
    def shapes(self) -> list[tuple[int, int]]:
        """Distinct shapes of a layer's matrices."""
        narrow = self.hidden // self.heads * self.key_value_heads
        wide = [(self.hidden, self.hidden), (self.mlp, self.hidden), (self.hidden, self.mlp)]
        return list(dict.fromkeys([*wide, (narrow, self.hidden)]))


SIZES = {"1B-like": Size(2048, 8192, 16, 32), "8B-like": Size(4096, 14336, 32, 32, batch=4)}


def llama_config(size: Size) -> Any:
    """The Hugging Face configuration of a size."""
    import transformers

    return transformers.LlamaConfig(
        hidden_size=size.hidden,
        intermediate_size=size.mlp,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=size.key_value_heads,
        vocab_size=size.vocabulary,
        pad_token_id=0,
        use_cache=False,
    )


def make_model(size: Size, device: str | None = None) -> Any:
    """A frozen random causal language model in bfloat16, in evaluation mode, on the device of the benchmark."""
    import transformers

    torch.manual_seed(0)
    with torch.device(device or DEVICE):
        model = transformers.AutoModelForCausalLM.from_config(llama_config(size), dtype=torch.bfloat16)
    return model.eval().requires_grad_(False)


def sharing(model: Any) -> Any:
    """A copy of the modules with the same parameters: hooks and values attached to one are not on the other."""
    same = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, same)


def make_rows(size: Size, count: int, tokens: int | None = None) -> list[dict[str, Any]]:
    """Random texts of equal length."""
    generator = torch.Generator().manual_seed(0)
    ids_NT = torch.randint(5, size.vocabulary, (count, tokens or TOKENS), generator=generator)
    return [{"input_ids": ids, "labels": ids} for ids in ids_NT]


def on_device(rows: list[dict[str, Any]]) -> dict[str, Tensor]:
    """The batch of these rows on the benchmark's device."""
    return {key: value.to(DEVICE) for key, value in collate(rows).items()}


def synchronised(measured: Mapping[str, Callable[[], object]], calls: int = 1) -> dict[str, Callable[[], None]]:
    """Each function as one that runs it `calls` times and waits for the GPU."""

    def until_done(function: Callable[[], object]) -> Callable[[], None]:
        def run() -> None:
            for _ in range(calls):
                function()
            wait()

        return run

    return {name: until_done(function) for name, function in measured.items()}


def wait() -> None:
    """Wait for the GPU."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def allocated() -> int:
    """Bytes of the GPU's tensors; 0 on a CPU."""
    return torch.cuda.memory_allocated() if DEVICE == "cuda" else 0


def peak_of(step: Callable[[], object]) -> int:
    """Peak bytes of the GPU's tensors in a step; 0 on a CPU."""
    if DEVICE != "cuda":
        step()
        return 0
    torch.cuda.reset_peak_memory_stats()
    step()
    wait()
    return torch.cuda.max_memory_allocated()


def free() -> None:
    """Release unused memory."""
    gc.collect()
    if DEVICE == "cuda":
        torch.cuda.empty_cache()
