"""GPUs by name: memory, peak operations and bandwidths.

Numbers are from the makers' data sheets, without sparsity. Links and networks are per GPU and direction.

- h100-80gb, h200-141gb: NVIDIA H100 / H200 SXM data sheets (989 TFLOP/s bfloat16, 67 float32, NVLink 900 GB/s both
  ways); network of a DGX H100 (ConnectX-7, 400 Gb/s a GPU).
- a100-40gb, a100-80gb: NVIDIA A100 SXM data sheet (312, 19.5, NVLink 600 GB/s); network of a DGX A100 (200 Gb/s a GPU).
- b200-180gb: NVIDIA HGX B200 data sheet (2250, 75, NVLink 1.8 TB/s); network of a DGX B200 (400 Gb/s a GPU).
- l40s-48gb: NVIDIA L40S data sheet (362, 91.6, PCIe 4.0 x16: 64 GB/s both ways); a network of 100 Gb/s a GPU.
- rtx4090-24gb: NVIDIA Ada architecture whitepaper (165.2 with float32 sums, 82.6, PCIe 4.0 x16); 25 Gb/s a GPU.
- l4-24gb, a10g-24gb: NVIDIA L4 data sheet (121, 30.3), NVIDIA A10G data sheet (70, 31.5), both PCIe 4.0 x16, and
  22.4 GiB beside their error correction; 25 Gb/s a GPU.
- cpu: a rank of two AVX2 threads, as measured for `irdscale.sparse.products`; the memory is this machine's, shared by
  its ranks; a network of 10 Gb/s.

`irdscale.plan.rates` has the measured shares of the peak.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from irdscale.errors import InputError
from irdscale.plan.rates import CPU, H100, Rates, Shares, StepKind
from irdscale.utils.formats import GIB
from irdscale.utils.suggestions import nearest

# Assumed share of a link's bandwidth that collectives reach; not measured.
LINKS = 0.7
# GPU memory for the context and libraries' workspaces in bytes, and the share lost between allocations.
CONTEXT, IDLE = 2 * GIB, 0.05


@dataclass(frozen=True)
class Gpu:
    """One kind of GPU.

    Attributes:
        memory: bytes of memory.
        bfloat16, float32: peak floating-point operations per second in matrix products.
        link, network: bandwidth in bytes per second to GPUs of the same node, and of other nodes.
        rates: shares of the peak that passes and steps reach.
    """

    name: str
    memory: float
    bfloat16: float
    float32: float
    link: float
    network: float
    rates: Rates = H100

    @property
    def room(self) -> float:
        """Bytes available for tensors."""
        return self.room_of(1)

    def room_of(self, share: float) -> float:
        """Bytes available for the tensors of one process with a share of the GPU."""
        return self.memory if self.name == "cpu" else (1 - IDLE) * share * self.memory - CONTEXT

    @property
    def measured(self) -> bool:
        """Whether the rates were measured on this device."""
        return self.rates.device == self.name

    def pass_flops(self, item: int) -> float:
        """Operations per second in a forward pass and its input gradients, with `item` bytes per weight."""
        return self._shares(item).passes.value * self._peak(item)

    def gradient_flops(self, item: int) -> float:
        """Operations per second in weight gradients."""
        return self._shares(item).gradients.value * self._peak(item)

    def square_flops(self, item: int) -> float:
        """Operations per second in sums of squared per-sample gradients, counting the products alone."""
        return self._shares(item).squares.value * self.gradient_flops(item)

    def step_over_limit(self, kind: StepKind) -> float:
        """Time of a training step over that of a forward pass and its input gradients."""
        return self.rates.steps[kind].value

    def _shares(self, item: int) -> Shares:
        return self.rates.bfloat16 if item == 2 else self.rates.float32

    def _peak(self, item: int) -> float:
        return self.bfloat16 if item == 2 else self.float32

    def bandwidth(self, nodes: int) -> float:
        """Bytes per second that a rank sends in a collective over so many nodes."""
        return LINKS * (self.link if nodes == 1 else min(self.link, self.network))


def _gpu(name: str, gib: float, bfloat16: float, float32: float, link: float, network: float) -> Gpu:
    return Gpu(name, gib * GIB, bfloat16 * 1e12, float32 * 1e12, link * 1e9, network * 1e9)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("h100-80gb", 80, 989, 67, 450, 50),
        _gpu("h200-141gb", 141, 989, 67, 450, 50),
        _gpu("b200-180gb", 180, 2250, 75, 900, 50),
        _gpu("a100-40gb", 40, 312, 19.5, 300, 25),
        _gpu("a100-80gb", 80, 312, 19.5, 300, 25),
        _gpu("l40s-48gb", 48, 362, 91.6, 32, 12.5),
        _gpu("rtx4090-24gb", 24, 165.2, 82.6, 32, 3.1),
        _gpu("l4-24gb", 22.4, 121, 30.3, 32, 3.1),
        _gpu("a10g-24gb", 22.4, 70, 31.5, 32, 3.1),
        Gpu("cpu", 0, 150e9, 150e9, 4e9, 1.25e9, rates=CPU),
    )
}


def find_gpu(name: str, gpus_per_node: int) -> Gpu:
    """The GPU with this name; `cpu` is a rank of this machine.

    Raises:
        InputError: there is none (names the nearest).
    """
    if name not in GPUS:
        raise InputError(f"found {name!r}{nearest(name, GPUS)}", f"one of {', '.join(GPUS)}", key="gpu")
    if name != "cpu":
        return GPUS[name]
    import psutil

    return replace(GPUS[name], memory=psutil.virtual_memory().total / gpus_per_node)
