"""How work reaches other processes: once each, as bytes.

Pickled by value where that is needed (functions of a script or a notebook), by name where it can
be; and what a configuration built goes as the configuration, from which the worker builds it again.
"""

from __future__ import annotations

import io
import os
import pickle
import sys
from collections.abc import Callable
from typing import Any, TypeVar

from tda.code import files_of_code, load_file
from tda.errors import ClusterError

T = TypeVar("T")

_REMADE: dict[int, tuple[Any, Callable[[], Any]]] = {}  # by id; held, so that no id is used again


def remade(thing: T, make: Callable[[], T]) -> T:
    """``thing``, which will cross to workers as ``make`` and be made there.

    ``make`` pickles small; whoever uses the thing compares what came out with what was meant.
    """
    _REMADE[id(thing)] = thing, make
    return thing


def pack(work: Any) -> bytes:
    """Raises ClusterError where something in ``work`` cannot be pickled."""
    import cloudpickle

    class Pickler(cloudpickle.Pickler):
        def reducer_override(self, thing: Any) -> Any:
            known = _REMADE.get(id(thing))
            if known is not None and known[0] is thing:
                return known[1], ()
            return super().reducer_override(thing)

    buffer = io.BytesIO()
    try:
        Pickler(buffer, protocol=5).dump(work)
    except Exception as error:  # whatever a user's __reduce__ raises
        raise ClusterError(
            "the work cannot be sent to other processes",
            where=f"pickling {type(work).__name__}",
            found=f"{type(error).__name__}: {error}",
            wanted="a task, data and functions that pickle",
            do="open files, locks and generators where they are used and not where the object is "
            "made; or name the functions that build task and data in a configuration: workers "
            "then build their own",
        ) from error
    parts = os.getcwd(), list(sys.path), files_of_code(), buffer.getvalue()
    return pickle.dumps(parts, protocol=5)


def unpack(data: bytes) -> Any:
    """What was packed, in the folder where it was. Raises ClusterError if it cannot be had here."""
    folder, path, files, inner = pickle.loads(data)
    if os.path.isdir(folder):  # names of files in a task or a configuration may be relative
        os.chdir(folder)
    sys.path.extend(entry for entry in path if entry not in sys.path)
    try:
        for file in files:
            load_file(file)
        return pickle.loads(inner)
    except Exception as error:
        raise ClusterError(
            "the work cannot be loaded by a worker",
            where=os.uname().nodename if hasattr(os, "uname") else None,
            found=f"{type(error).__name__}: {error}",
            wanted="the packages, the code and the files that this process has, at the same paths",
            do="install them on the workers, or put code and data on a file system they share",
        ) from error
