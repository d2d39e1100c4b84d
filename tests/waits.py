"""Counts what would wait for a GPU: operations whose result the host must see, on whatever device they run here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from typing import Any
from unittest import mock

import torch
from torch.utils._python_dispatch import TorchDispatchMode

aten = torch.ops.aten
# Their outputs have sizes that only the device knows, or they are numbers for the host.
WAITING = {
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten._unique2,
    aten.unique_dim,
    aten.unique_consecutive,
    aten.bincount,
    aten.equal,
    aten.is_nonzero,
}
READERS = ("cpu", "tolist", "numpy")


class Waits(TorchDispatchMode):
    """Inside, `counts` has how often each waiting operation ran, and `softmax` the dimensions of softmaxes.

    What the host does with its own tensors, inside `host`, does not count.
    """

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()
        self.softmax: set[int] = set()
        self._on_host = 0
        self._readers = [mock.patch.object(torch.Tensor, name, self._counted(name)) for name in READERS]

    def __enter__(self) -> Waits:
        for reader in self._readers:
            reader.start()
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        for reader in self._readers:
            reader.stop()

    @property
    def total(self) -> int:
        return self.counts.total()

    @contextmanager
    def _host(self) -> Iterator[None]:
        self._on_host += 1
        try:
            yield
        finally:
            self._on_host -= 1

    def host(self, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, as work on tensors of the host."""

        @wraps(function)
        def called(*args: Any, **kwargs: Any) -> Any:
            with self._host():
                return function(*args, **kwargs)

        return called

    def _counted(self, name: str) -> Callable[..., Any]:
        original = getattr(torch.Tensor, name)

        def reader(tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            if not self._on_host:
                self.counts[name] += 1
            with self._host():
                return original(tensor, *args, **kwargs)

        return reader

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        packet = func.overloadpacket
        if packet in (aten._log_softmax, aten._softmax):
            self.softmax.add(args[1] % args[0].dim() - args[0].dim())
        if not self._on_host and (packet in WAITING or _takes_booleans(packet, args)):
            self.counts[str(packet)] += 1
        return func(*args, **(kwargs or {}))


def _takes_booleans(packet: Any, args: Any) -> bool:
    if packet not in (aten.index, aten.index_put_, aten.index_put):
        return False
    return any(index is not None and index.dtype in (torch.bool, torch.uint8) for index in args[1])
