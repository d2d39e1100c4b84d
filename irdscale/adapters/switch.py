"""Several adapters on one base model: the next one takes the place of the one before, and the base stays loaded."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from irdscale.adapters.base import known_hash
from irdscale.adapters.format import check_base, check_fits, make_room, put_numbers, read_adapter
from irdscale.adapters.heads import check_head, put_head
from irdscale.distributed.zero3 import shape_of
from irdscale.sparse.model import sparse_state, unload


def switch_adapter(model: nn.Module, folder: Path | str) -> nn.Module:
    """Take the adapter off a sparse model, in place, bit for bit, and put another one of the same base on.

    The base is hashed at the first switch, and again only where its tensors were replaced or written to since, as
    autograd's version counters tell; writing to a frozen weight through `.data` goes unseen. Everything is checked
    before anything is changed. The trained numbers are new parameters: an optimizer of the old ones does not train
    them.

    Args:
        model: from `load_adapter` or `sparsify`.
        folder: of the other adapter, or `OWNER/NAME` on the Hugging Face hub.

    Raises:
        InputError: the model is not sparse, the adapter is missing or damaged, or trained on another base, or for
            other classes than the base model's; the model keeps the adapter that it has.
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
    put_numbers(model, adapter)
    put_head(model, adapter.head)
    sparse_state(model).known_bases = state.known_bases
    return model
