"""State dicts: read from a file, known by their content, kept apart from a model's own memory."""

from __future__ import annotations

import copy
import hashlib
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tda.errors import TaskError
from tda.identity import bytes_of

Weights = Mapping[str, Tensor]
_WRAPPERS = ("_orig_mod", "module")  # torch.compile; data-parallel training


def read(path: Path, what: str, do: str) -> Any:
    """The content of a file of tensors. Raises TaskError."""
    if path.is_dir():
        raise TaskError(
            f"{what} is a file, and this is a folder",
            where=path,
            do="name the files in it; or if tda.Recorder wrote it, give tda.recorded(folder)",
        )
    if not path.is_file():
        raise TaskError(
            f"{what} is missing", where=path, do="check the path, or train the model first"
        )
    try:
        return _load(path)
    except (OSError, RuntimeError, ValueError, EOFError, pickle.UnpicklingError) as error:
        raise TaskError(
            f"{what} cannot be read",
            where=path,
            found=(str(error).splitlines() or [type(error).__name__])[0],
            wanted="a state dict of tensors (files that carry code are not loaded)",
            do=do,
        ) from error


def _load(path: Path) -> Any:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    return torch.load(path, map_location="cpu", weights_only=True)


def under(loaded: Any, *keys: str) -> Any:
    """What a dict holds under one of the keys, or itself."""
    for key in keys:
        if isinstance(loaded, Mapping) and isinstance(loaded.get(key), Mapping):
            loaded = loaded[key]
    return loaded


def require_tensors(weights: Any, where: object, do: str) -> None:
    """Raises TaskError for what is no state dict, by what it holds instead."""
    if not isinstance(weights, Mapping):
        found = type(weights).__name__
    elif strange := {n: v for n, v in weights.items() if not isinstance(v, Tensor)}:
        some = list(strange.items())[:5]
        found = "a dict that holds " + ", ".join(f"{n!r}: {type(v).__name__}" for n, v in some)
    else:
        return
    raise TaskError(
        "these are no weights",
        where=where,
        found=found,
        wanted="a state dict of tensors (in a file, it may be under 'model', 'state_dict' or "
        "'model_state_dict')",
        do=do,
    )


def digest_of(weights: Weights) -> str:
    """Hex digest of the names, types, shapes and bytes of a state dict."""
    state = hashlib.blake2b(digest_size=16)
    for name in sorted(weights):
        tensor = weights[name]
        state.update(f"{name}{tensor.dtype}{tuple(tensor.shape)}".encode())
        state.update(bytes_of(tensor).data)
    return state.hexdigest()


def without_wrapper(weights: Weights, model: nn.Module) -> Weights:
    """Without what torch.compile and data-parallel training put before every name."""
    known = dict(model.named_parameters()).keys()
    while weights and known.isdisjoint(weights):
        first = next(iter(weights)).partition(".")[0]
        if first not in _WRAPPERS or not all(name.startswith(f"{first}.") for name in weights):
            break
        weights = {name.removeprefix(f"{first}."): value for name, value in weights.items()}
    return weights


def place_of(value: Any) -> tuple[Any, ...]:
    """Equal of tensors that are the same numbers in memory."""
    if not storage_of(value):
        return (id(value),)
    return value.device, value.data_ptr(), value.dtype, value.shape, value.stride()


def storage_of(value: Any) -> int:
    """Where the memory begins that a tensor of torch's own is a part of, 0 without any."""
    if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
        return 0
    return value.untyped_storage().data_ptr()


def apart_from(weights: dict[str, Any], live: set[int]) -> Weights:
    """With copies on the CPU of what lies in ``live`` storages; tied weights stay so."""
    found, made = copy.copy(weights), {}
    for name, value in weights.items():
        if storage_of(value) in live:
            place = place_of(value)
            if place not in made:
                made[place] = value.detach().to("cpu", copy=True)
            found[name] = made[place]
    return found
