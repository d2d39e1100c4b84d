"""The base model with an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from irdscale.adapters import load_adapter
from irdscale.adapters.hub import find_adapter
from irdscale.config.schema import RunConfig
from irdscale.models.build import build_model
from irdscale.utils.files import read_json

if TYPE_CHECKING:
    from irdscale.tasks import Task


def adapted_model(config: RunConfig, task: Task, adapter: str) -> tuple[Any, list[str]]:
    """The model with an adapter, and the names of the parameters that are not in the base checkpoint.

    A new head that is not in the adapter is initialised by the seed of the adapter's training.

    Raises:
        InputError: as `build_model` and `load_adapter`.
    """
    folder = find_adapter(adapter)
    meta = read_json(folder / "adapter.json", "adapter")
    made_with = meta.get("config") if isinstance(meta, dict) else None
    seed = made_with.get("seed") if isinstance(made_with, dict) else None
    seed = seed if isinstance(seed, int) else config.search.seeds[0]
    model, new = build_model(config, task, seed)
    return load_adapter(model, folder), new
