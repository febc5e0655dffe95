"""How a command ends: done, with an error that says what to do, interrupted, or asked to stop."""

from __future__ import annotations

from contextlib import AbstractContextManager, ExitStack
from typing import Any, TypeVar

import typer
from typer.core import TyperGroup

from tda.cluster import PreemptedError, on_sigterm
from tda.errors import TdaError

T = TypeVar("T")

INTERRUPTED = 130  # the shell's convention for a process ended by Ctrl-C
PREEMPTED = 75  # EX_TEMPFAIL of sysexits.h: nothing is wrong, run it again


_HELD = ExitStack()


def until_the_end(resource: AbstractContextManager[T]) -> T:
    """Enter it, and leave it when the command ends."""
    return _HELD.enter_context(resource)


class Commands(TyperGroup):
    """Every command ends in an exit code: errors made on purpose are shown without a traceback.

    SIGTERM is heeded as ``tda.cluster.leaving`` says.
    """

    def invoke(self, ctx: Any) -> Any:
        try:
            with on_sigterm(), _HELD:
                return super().invoke(ctx)
        except TdaError as error:
            typer.secho("error: ", fg="red", bold=True, nl=False, err=True)
            typer.echo(str(error), err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as error:
            preempted = isinstance(error, PreemptedError)
            what = "asked to stop (SIGTERM)" if preempted else "\ninterrupted"
            typer.echo(f"{what}. What is finished is kept; the same command resumes.", err=True)
            raise typer.Exit(PREEMPTED if preempted else INTERRUPTED) from error
