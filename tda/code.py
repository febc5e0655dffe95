"""The Python code that a configuration names as ``module:function`` or ``file.py:function``."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

from tda.errors import ConfigError

CODE = (
    "module:function, or file.py:function with the file relative to the configuration's folder "
    "or to the current directory"
)
_PREFIX = "tda._workload."


def load_code(reference: str, folder: Path) -> Callable[..., Any]:
    """The function named by ``module:function`` or ``file.py:function`` (this runs its module)."""
    module_name, _, name = reference.rpartition(":")
    if module_name.endswith(".py"):
        module = _find_file(module_name, reference, folder)
    else:
        module = _load_module(module_name, reference, folder)
    function = getattr(module, name, None)
    if not callable(function):
        known = [key for key, value in vars(module).items() if inspect.isfunction(value)]
        raise ConfigError(
            f"{module_name} has no function {name!r}",
            where=reference,
            wanted=", ".join(key for key in known if not key.startswith("_")) or None,
            do=did_you_mean(name, known),
        )
    return function


def _find_file(module_name: str, reference: str, folder: Path) -> ModuleType:
    candidates = [folder / module_name, Path.cwd() / module_name]
    file = next((c.resolve() for c in candidates if c.is_file()), None)
    if file is None:
        raise ConfigError(
            f"there is no file {module_name}",
            where=reference,
            found="neither " + " nor ".join(str(c) for c in candidates),
            wanted=CODE,
        )
    return load_file(str(file))


def load_file(file: str) -> ModuleType:
    """The module in a file, run once: what task, train and queries of one job load is shared."""
    key = f"{_PREFIX}{file}"
    if key in sys.modules:
        return sys.modules[key]
    spec = importlib.util.spec_from_file_location(key, file)
    assert spec is not None and spec.loader is not None, file
    module = importlib.util.module_from_spec(spec)
    sys.modules[key] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[key]
        raise
    return module


def _load_module(module_name: str, reference: str, folder: Path) -> ModuleType:
    # Appended, so that a file that happens to lie here never stands in for an installed package.
    sys.path.extend(p for p in (str(folder), str(Path.cwd())) if p not in sys.path)
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name is None or not module_name.startswith(error.name):
            raise  # the module is there; something that it imports is not
        raise ConfigError(
            f"there is no module {module_name!r}",
            where=reference,
            wanted=CODE,
            do="install the module, or name its file: path/to/file.py:function",
        ) from error


def accepted(function: Callable[..., Any], options: Mapping[str, Any]) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters
    if any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values()):
        return dict(options)
    return {name: value for name, value in options.items() if name in parameters}


def files_of_code() -> list[str]:
    """The files that have been loaded so: another process needs them before what refers to them."""
    return [name.removeprefix(_PREFIX) for name in sys.modules if name.startswith(_PREFIX)]


def did_you_mean(found: str, known: Sequence[str]) -> str | None:
    close = difflib.get_close_matches(found, known, n=1)
    return f"did you mean {close[0]!r}?" if close else None
