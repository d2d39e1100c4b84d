"""The engine of a search or a comparison, by `search.runner`."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from irdscale.cluster import require_ray
from irdscale.config.schema import RunConfig
from irdscale.search.local import LocalEngine
from irdscale.search.runner import Engine

if TYPE_CHECKING:
    from irdscale.tasks import Task


@contextmanager
def running(config: RunConfig, task: Task, output: Path, progress: bool) -> Iterator[Engine]:
    """The engine that `search.runner` names, for the body."""
    if config.search.runner == "local":
        local = LocalEngine(config, task, output)
        try:
            yield local
        finally:
            local.release()
        return
    require_ray()
    from irdscale.search.ray_engine import ray_engine

    with ray_engine(config, task, output, progress) as engine:
        yield engine
