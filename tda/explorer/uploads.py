"""A query that a reader brings: made an example, featurized on the spot, stored with the run."""

from __future__ import annotations

import base64
import binascii
import inspect
import io
from typing import Any, Literal

import numpy as np
from PIL import Image, UnidentifiedImageError

from tda.data import Dataset, as_dataset, collate
from tda.errors import DataError, TdaError
from tda.examples import describe
from tda.explorer.asking import Explorer
from tda.featurizer import Featurizer
from tda.store.files import remove_tree

Kind = Literal["image", "text", "row"]
KINDS: tuple[Kind, ...] = ("image", "text", "row")
MAX_SIDE = 4096  # pixels
MAX_GUESSED = 128  # classes tried to find the one the model gives


class UnavailableError(TdaError):
    """This server cannot do that, as it was started."""


def kinds(explorer: Explorer) -> tuple[Kind, ...]:
    """What can be uploaded: what the configuration's function has a parameter for."""
    if explorer.run.task is None or explorer.make_example is None:
        return ()
    taken = inspect.signature(explorer.make_example).parameters
    return tuple(kind for kind in KINDS if kind in taken)


def require(explorer: Explorer, kind: str) -> None:
    """Raises UnavailableError, with what to do, unless such a query can be featurized here."""
    if explorer.run.task is None:
        raise UnavailableError(
            "new queries need the model, and this server was started from a folder",
            where=explorer.path,
            do="start it from the configuration: tda serve CONFIG.toml",
        )
    possible = kinds(explorer)
    if kind not in possible:
        raise UnavailableError(
            f"the configuration does not say how to make an example of an uploaded {kind}",
            where="[serve] example",
            found=", ".join(possible) or "nothing that can be uploaded",
            wanted=f"a function with the parameters label and {kind}",
            do="add it to the configuration and start again",
        )


def add_query(explorer: Explorer, kind: Kind, value: Any, label: float | None) -> str:
    """The name of a query set that holds the new query alone; the same query has the same name.

    label: what the model was asked for; None for the class it thinks most likely. Raises
    UnavailableError, or DataError if no example can be made of it.
    """
    require(explorer, kind)
    if kind == "image":
        value = read_image(value)
    with explorer.writing:
        chosen = _likeliest(explorer, kind, value) if label is None else label
        example = _make(explorer, kind, value, chosen)
        return _stored(explorer, kind, as_dataset([example]))


def _stored(explorer: Explorer, kind: Kind, data: Dataset) -> str:
    """Featurize and store; of what cannot be, nothing is left behind."""
    name = f"q-{describe(data).digest()[:16]}"
    known = name in explorer.library.query_sets()
    try:
        return explorer.run.add_queries(data, name)
    except Exception as error:
        if not known:
            remove_tree(explorer.path / "queries" / name)
        if isinstance(error, TdaError):
            raise
        raise DataError(
            f"the model cannot be asked about this {kind}", found=_in_words(error)
        ) from error


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def _make(explorer: Explorer, kind: Kind, value: Any, label: float) -> Any:
    whole = int(label) if float(label).is_integer() else label
    known = _classes(explorer)
    if len(known) and whole not in known:
        wanted = ", ".join(map(str, known[:MAX_GUESSED].tolist()))
        raise DataError("the training set has no such label", found=whole, wanted=wanted)
    try:
        return explorer.make_example(whole, **{kind: value})
    except TdaError:
        raise
    except Exception as error:  # the user's own code, about a stranger's input
        raise DataError(
            f"no example could be made of this {kind}",
            where="[serve] example",
            found=_in_words(error),
        ) from error


def _classes(explorer: Explorer) -> np.ndarray:
    """The labels of the training set, ascending; none where they are no classes."""
    gallery = explorer.library.train.gallery
    labels = gallery.column("label")
    known = labels is not None and labels.ndim == 1 and gallery.classes
    return np.unique(labels) if labels is not None and known else np.empty(0, int)


def _likeliest(explorer: Explorer, kind: Kind, value: Any) -> int:
    """The label the model gives the highest probability: each is tried, in one batch."""
    known = _classes(explorer)
    if not 1 <= len(known) <= MAX_GUESSED:
        raise DataError("this query needs a label", wanted="what the model was asked for")
    task = explorer.run.task
    assert task is not None
    tried = [_make(explorer, kind, value, int(label)) for label in known]
    batch = collate(tried, task.collate)
    featurizer = Featurizer(task)
    featurizer.at(len(task.checkpoints) - 1)
    gradients = featurizer.gradients
    loss = gradients.link(gradients.output(batch), batch).loss
    return int(known[int(loss.argmin())])


def read_image(encoded: str) -> np.ndarray:
    """uint8 [H, W] or [H, W, 3] of a picture file in base64. Raises DataError."""
    try:
        data = base64.b64decode(encoded, validate=True)
        picture = Image.open(io.BytesIO(data), formats=("PNG", "JPEG", "GIF", "BMP", "WEBP"))
        if max(picture.size) > MAX_SIDE:
            found = "{} × {} pixels".format(*picture.size)
            raise DataError("the picture is too large", found=found, wanted=f"{MAX_SIDE} a side")
        grey = picture.mode in ("1", "L", "LA", "I", "I;16", "F")
        return np.asarray(picture.convert("L" if grey else "RGB"))
    except (binascii.Error, ValueError, OSError, SyntaxError, UnidentifiedImageError) as error:
        raise DataError(
            "this is no picture that can be read",
            wanted="a PNG, JPEG, GIF, BMP or WebP file, in base64",
        ) from error
