"""Errors a user can act on: what happened, where, what was found, what was wanted, what to do."""

from __future__ import annotations


class TdaError(Exception):
    """Base of every error this package raises on purpose.

    ``str(error)`` is the sentence ``what`` followed by one indented line for each part given.
    """

    def __init__(
        self,
        what: str,
        *,
        where: object = None,
        found: object = None,
        wanted: object = None,
        do: str | None = None,
    ) -> None:
        self.what = what
        self.where = where
        self.found = found
        self.wanted = wanted
        self.do = do
        super().__init__(what)

    def __str__(self) -> str:
        parts = {"where": self.where, "found": self.found, "wanted": self.wanted, "do": self.do}
        lines = [f"  {name + ':':<8}{part}" for name, part in parts.items() if part is not None]
        return "\n".join([self.what, *lines])

    def __reduce__(self) -> tuple:  # keyword-only arguments do not survive the default pickling
        return _rebuild, (type(self), self.what, self.where, self.found, self.wanted, self.do)


def _rebuild(kind: type[TdaError], what: str, where, found, wanted, do) -> TdaError:
    return kind(what, where=where, found=found, wanted=wanted, do=do)


class TaskError(TdaError):
    """The model, a checkpoint or the measurement cannot be used as given."""


class DataError(TdaError):
    """The data set cannot be used as given."""


class GradientError(TdaError):
    """A per-example gradient is not finite, not covered, or not per example."""


class StoreError(TdaError):
    """A store is absent, unfinished, torn or altered."""


class UnreachableError(TdaError):
    """A store could not be asked: the network, the storage or its credentials fail.

    No StoreError: that would say something of what is stored.
    """


class MismatchError(TdaError):
    """A store was opened with something other than what it was made with."""


class RecipeError(TdaError):
    """A recipe is unknown, contradicts itself, or asks for what the run does not hold."""


class ConfigError(TdaError):
    """A configuration file is not valid."""


class ClusterError(TdaError):
    """A cluster cannot be had, or work does not reach it or come back."""
