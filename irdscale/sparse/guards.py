"""Guards of a model's methods that would lose its trained entries: they keep the entries, or refuse before any change.

They are set on the model and on its submodules that are transformers' models, and removed when the model is no longer
sparse.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from irdscale.distributed.zero3 import numel_of
from irdscale.errors import InputError
from irdscale.sparse.modules import SparseModule, held_entries


def guard(model: nn.Module, dense: Sequence[nn.Parameter]) -> None:
    """Set the guards.

    Args:
        dense: the densely trained parameters.
    """
    for module in model.modules():
        if module is model or hasattr(type(module), "resize_token_embeddings"):
            for name, guarded in _GUARDS.items():
                if hasattr(type(module), name) and name not in vars(module):
                    vars(module)[name] = _Guard(guarded, module, list(dense))


def unguard(model: nn.Module) -> None:
    """Remove the guards."""
    for module in model.modules():
        for name in _GUARDS:
            if isinstance(vars(module).get(name), _Guard):
                del vars(module)[name]


class _Guard(partial[Any]):
    """A guarded method of one module."""


def _original(module: Any, name: str) -> Callable[..., Any]:
    return partial(getattr(type(module), name), module)


def _refused(what: str, why: str) -> InputError:
    return InputError(f"{why}; unload or merge the sparse model first", key=what)


def _is_trained(part: Any, dense: Sequence[nn.Parameter]) -> bool:
    """Whether a part of a model holds trained entries or a densely trained parameter."""
    if not isinstance(part, nn.Module):
        return False
    ids = {id(parameter) for parameter in dense}
    return next(held_entries(part), None) is not None or any(id(p) in ids for p in part.parameters())


def _embeddings(module: Any) -> list[Any]:
    found = []
    for getter in (module.get_input_embeddings, module.get_output_embeddings):
        try:
            found.append(getter())
        except NotImplementedError:
            found.append(None)
    return found


def _resize_token_embeddings(
    module: Any,
    dense: Sequence[nn.Parameter],
    new_num_tokens: int | None = None,
    pad_to_multiple_of: int | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    held = [part for part in _embeddings(module) if part is not None]
    if any(_is_trained(part, dense) for part in held):
        rows = {int(part.weight.shape[0]) for part in held}
        wanted = new_num_tokens if new_num_tokens is not None else max(rows)
        if pad_to_multiple_of:
            wanted = -(-wanted // pad_to_multiple_of) * pad_to_multiple_of
        if rows != {wanted}:
            raise _refused("resize_token_embeddings", f"found trained entries in the {max(rows)} embeddings")
        return held[0]
    return _original(module, "resize_token_embeddings")(new_num_tokens, pad_to_multiple_of, *args, **kwargs)


def _put_embeddings(what: str, module: Any, dense: Sequence[nn.Parameter], value: Any) -> Any:
    held = _embeddings(module)[what == "set_output_embeddings"]
    if held is not value and _is_trained(held, dense):
        raise _refused(what, "found trained entries in the embeddings")
    return _original(module, what)(value)


def _tie_weights(module: Any, _dense: Sequence[nn.Parameter], *args: Any, **kwargs: Any) -> Any:
    """Repeat the present ties; new ones would separate entries from their parameters, and are refused."""
    before = [(part, dict(part._parameters)) for part in module.modules()]
    # Without gradients, reading a trained parameter returns the parameter itself.
    with torch.no_grad():
        result = _original(module, "tie_weights")(*args, **kwargs)
    held = list(held_entries(module))
    masked = {id(entries.parameter) for *_, entries in held}
    kept = all(part._parameters[name] is entries.parameter for _, part, name, entries in held)
    plain = (part for part in module.modules() if not isinstance(part, SparseModule))
    if not kept or any(id(parameter) in masked for part in plain for parameter in part._parameters.values()):
        for part, parameters in before:
            part._parameters.clear()
            part._parameters.update(parameters)
        raise _refused("tie_weights", "found trained entries in parameters that it would tie")
    return result


def _requires_grad_(module: Any, dense: Sequence[nn.Parameter], requires_grad: bool = True) -> Any:
    """Set `requires_grad` of the trained parameters; the base stays frozen."""
    trained = {id(parameter) for parameter in dense}
    for *_, entries in held_entries(module):
        trained = trained - {id(entries.parameter)} | {id(entries.values)}
    for parameter in module.parameters():
        parameter.requires_grad_(requires_grad and id(parameter) in trained)
    return module


def _lose(what: str, _module: Any, _dense: Sequence[nn.Parameter], *_: Any, **__: Any) -> Any:
    raise _refused(what, "it would lose the trained parameters")


def _save_pretrained(
    module: Any,
    _dense: Sequence[nn.Parameter],
    save_directory: Any,
    is_main_process: bool = True,
    state_dict: dict[str, Tensor] | None = None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """Save effective weights; for ZeRO-3 they are computed from the base and values that DeepSpeed gathers."""
    if is_main_process and any(entries.partitioned for *_, entries in held_entries(module)):
        if not state_dict:
            raise InputError(
                "found ZeRO-3 partitions; use save_adapter, or merge the model first", key="save_pretrained"
            )
        state_dict = _effective(module, state_dict)
    return _original(module, "save_pretrained")(save_directory, is_main_process, state_dict, *args, **kwargs)


def _effective(module: nn.Module, state_dict: dict[str, Tensor]) -> dict[str, Tensor]:
    made = dict(state_dict)
    for name, _, _, entries in held_entries(module):
        weight, values = made.get(name), made.pop(f"{name}_values", None)
        if weight is None:
            continue
        if values is None or weight.numel() != numel_of(entries.parameter):
            raise InputError(
                f"{name}: found a partition of the weight; use save_adapter, or merge first", key="save_pretrained"
            )
        base = entries.base.to(weight.device)
        weights = values.to(weight.device) if entries.absolute else base + values.to(base.device)
        flat = weight.detach().clone().view(-1)
        made[name] = flat.index_copy_(0, entries.index.to(flat.device).long(), weights.to(flat)).view(weight.shape)
    return made


_GUARDS: dict[str, Callable[..., Any]] = {
    "resize_token_embeddings": _resize_token_embeddings,
    "resize_position_embeddings": partial(_lose, "resize_position_embeddings"),
    "set_input_embeddings": partial(_put_embeddings, "set_input_embeddings"),
    "set_output_embeddings": partial(_put_embeddings, "set_output_embeddings"),
    "tie_weights": _tie_weights,
    "requires_grad_": _requires_grad_,
    "to_empty": partial(_lose, "to_empty"),
    "save_pretrained": _save_pretrained,
}
