"""Tables for people who work in pandas, which is imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from importlib import import_module
from typing import Any

from tda.errors import ConfigError


def frame(columns: Mapping[str, Any]) -> Any:
    """A pandas DataFrame with these columns, all of one length.

    Raises ConfigError where pandas is not installed.
    """
    try:
        pandas = import_module("pandas")
    except ImportError as error:
        raise ConfigError(
            "a table needs pandas",
            found="pandas is not installed",
            do="pip install pandas; every number is also an array of the result",
        ) from error
    return pandas.DataFrame(dict(columns))
