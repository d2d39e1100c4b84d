"""Sparse fine-tuning chosen by data: FISH masks, searched by iterative range decreasing (IRD).

The names below are imported on first use, so that `import irdscale` is fast and does not import torch.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from irdscale.errors import InputError, RunError
from irdscale.utils.late import late_names

if TYPE_CHECKING:
    from irdscale.adapters import export_shira, load_adapter, pull_adapter, push_adapter, save_adapter, switch_adapter
    from irdscale.fisher import Fisher, accumulate_fisher
    from irdscale.masks.mask import Mask, top_k
    from irdscale.sparse import merge, sparsify, unload

__version__ = "0.1.0"

__all__ = [
    "Fisher",
    "InputError",
    "Mask",
    "RunError",
    "accumulate_fisher",
    "export_shira",
    "load_adapter",
    "merge",
    "pull_adapter",
    "push_adapter",
    "save_adapter",
    "sparsify",
    "switch_adapter",
    "top_k",
    "unload",
]

_HOME = {
    "Fisher": "irdscale.fisher",
    "accumulate_fisher": "irdscale.fisher",
    "Mask": "irdscale.masks.mask",
    "top_k": "irdscale.masks.mask",
    "export_shira": "irdscale.adapters",
    "load_adapter": "irdscale.adapters",
    "merge": "irdscale.sparse",
    "pull_adapter": "irdscale.adapters",
    "push_adapter": "irdscale.adapters",
    "save_adapter": "irdscale.adapters",
    "sparsify": "irdscale.sparse",
    "switch_adapter": "irdscale.adapters",
    "unload": "irdscale.sparse",
}

__getattr__ = late_names(__name__, _HOME)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
