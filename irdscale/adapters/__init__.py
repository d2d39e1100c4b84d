"""Adapters: the files of a trained mask: saved, loaded, switched, shared on the hub, exported for PEFT."""

from irdscale.adapters.format import load_adapter, save_adapter, switch_adapter
from irdscale.adapters.heads import adapter_head
from irdscale.adapters.hub import pull_adapter, push_adapter
from irdscale.adapters.shira import export_shira

__all__ = [
    "adapter_head",
    "export_shira",
    "load_adapter",
    "pull_adapter",
    "push_adapter",
    "save_adapter",
    "switch_adapter",
]
