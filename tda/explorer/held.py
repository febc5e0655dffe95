"""Values kept in memory between questions: the least recently used go first."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import fields, is_dataclass
from threading import Lock
from typing import Any, TypeVar

import numpy as np
from torch import Tensor

T = TypeVar("T")
SMALL = 1024  # bytes a value is counted for at least


class Held:
    """At most ``num_bytes`` of values by key. Safe to use from many threads.

    Two who ask for the same value at once wait for one computation of it; an error is not kept.
    """

    def __init__(self, num_bytes: int) -> None:
        self._room = num_bytes
        self._values: OrderedDict[Hashable, Any] = OrderedDict()
        self._turns: dict[Hashable, Lock] = {}
        self._lock = Lock()

    def get(self, key: Hashable, make: Callable[[], T]) -> T:
        """The value kept under ``key``, or the one made now."""
        with self._lock:
            if key in self._values:
                self._values.move_to_end(key)
                return self._values[key]
            turn = self._turns.setdefault(key, Lock())
        try:
            with turn:
                if key in self._values:
                    return self._values[key]
                value = make()
                self._keep(key, value)
                return value
        finally:
            self._turns.pop(key, None)

    def has(self, key: Hashable) -> bool:
        return key in self._values

    def _keep(self, key: Hashable, value: Any) -> None:
        with self._lock:
            self._values[key] = value
            room = self._room - sum(map(num_bytes, self._values.values()))
            while room < 0 and len(self._values) > 1:
                room += num_bytes(self._values.popitem(last=False)[1])


def num_bytes(value: Any) -> int:
    """Of the arrays in a value, in tuples, lists and dataclasses too."""
    if isinstance(value, np.ndarray | Tensor):
        return max(SMALL, value.nbytes)
    if isinstance(value, list | tuple):
        return SMALL + sum(num_bytes(part) for part in value if not isinstance(part, str | int))
    if is_dataclass(value) and not isinstance(value, type):
        parts = [getattr(value, field.name) for field in fields(value)]
        counted = np.ndarray | Tensor | tuple
        return SMALL + sum(num_bytes(part) for part in parts if isinstance(part, counted))
    return SMALL
