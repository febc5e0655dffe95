"""Tables for people who work in pandas, which is imported only when one is asked for."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from tda.integrations.partner import partner


def frame(columns: Mapping[str, Any]) -> Any:
    """A pandas DataFrame with these columns, all of one length.

    Raises ConfigError where pandas is not installed.
    """
    return partner("pandas", "pandas").DataFrame(dict(columns))
