"""Several adapters on one base model: an adapter replaces another while the base stays loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from irdscale.adapters.base import known_hash
from irdscale.adapters.format import check_base, check_fits, make_room, read_adapter
from irdscale.adapters.heads import check_head, put_head
from irdscale.distributed.zero3 import shape_of
from irdscale.sparse.model import set_trained_numbers, sparse_state, unload


def switch_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Replace the adapter of a sparse model, in place, bit for bit, by another one of the same base.

    The base is hashed at the first switch, and again only after its tensors were replaced or written to, by autograd's
    version counters; a write to a frozen weight through `.data` is not noticed. All checks precede the first change.
    The trained parameters are new tensors: an optimizer of the old ones does not train them.

    Args:
        model: from `load_adapter` or `sparsify`.
        folder: folder of the other adapter, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        InputError: the model is not sparse, or the adapter is missing, damaged, or trained on another base or for other
            classes; the model keeps its adapter.
    """
    state = sparse_state(model)
    adapter = read_adapter(folder)
    check_head(model, adapter.head, state.head_before)
    values = {id(entries.values) for entries in state.patched}
    shapes = {name: shape_of(p) for name, p in model.named_parameters() if id(p) not in values}
    check_fits(adapter, shapes)
    check_base(adapter, known_hash(model, adapter.dense))
    unload(model)
    make_room(model, adapter)
    set_trained_numbers(model, adapter.values, adapter.dense)
    put_head(model, adapter.head)
    sparse_state(model).known_bases = state.known_bases
    return model
