"""What a function is known by: its source, and what it was made with.

    source_of      the text of the code, but not of what that calls
    settings_of    what a partial, a closure, a default or a callable object holds

Both are the same in every process, so that a run that goes on knows whether it is by the same
function.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import inspect
import types
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass
from enum import Enum
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn


def source_of(function: Callable) -> str:
    """Its source; of one without, from a prompt say, its compiled code, or its type."""
    try:
        return inspect.getsource(function)
    except (OSError, TypeError):  # defined at a prompt, or a callable object
        code = getattr(function, "__code__", None)
        if code is None:
            return f"{type(function).__module__}.{type(function).__qualname__}"
        return _code(code)


def _code(code: types.CodeType) -> str:
    consts = tuple(_code(c) if isinstance(c, types.CodeType) else c for c in code.co_consts)
    return f"{code.co_code.hex()}{consts!r}{code.co_names!r}"


def settings_of(function: Any, within: tuple[int, ...] = ()) -> str:
    """What a callable was made with, beside its code; nothing where there is nothing."""
    made: dict[str, Any]
    if id(function) in within:
        return "itself"
    if isinstance(function, types.FunctionType) and _compiles(function.__globals__.get("__name__")):
        return settings_of(getattr(function, "__wrapped__", None), within)
    if isinstance(function, types.MethodType):
        return settings_of(function.__func__, within) + settings_of(function.__self__, within)
    if isinstance(function, functools.partial):
        made = {"of": function.func, "args": function.args, "keywords": function.keywords}
    elif isinstance(function, types.FunctionType):
        names = ("__closure__", "__defaults__", "__kwdefaults__")
        made = {name: getattr(function, name) for name in names if getattr(function, name)}
    elif isinstance(function, nn.Module):
        made = {"layers": _layers(function), "weights": function.state_dict()}
    else:
        made = {} if isinstance(function, _NAMED) else _held(function)
    return _described(made, (*within, id(function))) if made else ""


_BY_REPR = (types.NoneType, bool, int, float, complex, str, bytes, range, torch.dtype, torch.device)
_NAMED = (type, types.ModuleType, types.BuiltinFunctionType, np.ufunc)
_NAMESPACES = (types.SimpleNamespace, argparse.Namespace)


def _described(value: Any, within: tuple[int, ...] = ()) -> str:
    """The same of equal values in every process: contents, or the type where they are not known.

    within: the ids of what the value lies in, which it may hold in turn.
    """
    if id(value) in within:
        return "itself"
    try:
        return f"{_name(type(value))}:{_contents(value, (*within, id(value)))};"
    except Exception:  # a tensor without numbers, a cell that is still empty, …
        return _name(type(value))


def _contents(value: Any, within: tuple[int, ...]) -> str:
    if isinstance(value, Enum):
        return value.name
    if isinstance(value, np.ndarray | np.generic) and not value.dtype.hasobject:
        return f"{value.dtype}{value.shape}{digest(value.tobytes())}"
    if isinstance(value, _BY_REPR):
        return repr(value)
    if isinstance(value, Tensor):
        return f"{value.dtype}{tuple(value.shape)}{digest(bytes_of(value))}"
    if isinstance(value, Mapping | set | frozenset):
        items = value.items() if isinstance(value, Mapping) else value
        return "".join(sorted(_described(item, within) for item in items))
    if isinstance(value, list | tuple):
        return "".join(_described(item, within) for item in value)
    if isinstance(value, types.CellType):
        return _described(value.cell_contents, within)
    if isinstance(value, _NAMED):
        return _name(value)
    if isinstance(value, types.FunctionType | types.MethodType):
        return source_of(value) + settings_of(value, within[:-1])
    if callable(value) or is_dataclass(value) or isinstance(value, _NAMESPACES):
        return settings_of(value, within[:-1])
    return ""


def _held(value: Any) -> dict[str, Any]:
    """The attributes of an object; those of a data class may be in slots."""
    named = {f.name: getattr(value, f.name) for f in fields(value)} if is_dataclass(value) else {}
    return {**named, **getattr(value, "__dict__", {})}


def _layers(module: nn.Module) -> dict[str, Any]:
    """Type and settings of a module and of those in it; numbers are in the state dict."""
    return {
        name: (type(part), {k: v for k, v in vars(part).items() if k[0] != "_" and k != "training"})
        for name, part in module.named_modules()
        if not _compiles(type(part).__module__)
    }


def _compiles(module: str | None) -> bool:
    """Whether a module's wrappers are those of torch.compile: what they wrap is what counts."""
    return (module or "").startswith("torch._dynamo")


def _name(thing: Any) -> str:
    module = getattr(thing, "__module__", None)
    return f"{module}.{getattr(thing, '__qualname__', thing.__name__)}"


def bytes_of(tensor: Tensor) -> np.ndarray:
    """Its numbers, as they lie in the memory of one that is in order: uint8 ``[byte]``."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


def digest(data: Any) -> str:
    return hashlib.blake2b(data, digest_size=16).hexdigest()
