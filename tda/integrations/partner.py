"""A package that only some need."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from tda.errors import ConfigError


def partner(extra: str, *modules: str) -> Any:
    """The first of ``modules`` that is installed. Raises ConfigError with the pip command."""
    for name in modules:
        try:
            return import_module(name)
        except ModuleNotFoundError as error:
            # Something missing inside a partner that is there is another fault, and not ours.
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise
    raise ConfigError(
        f"this needs {modules[0].partition('.')[0]}",
        found="it is not installed",
        wanted=f"the extra `{extra}`",
        do=f"pip install 'tda-engine[{extra}]'",
    )
