"""Pictures as PNG data URIs, small enough that a page of them stays small."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from tda.report.data import Example, ReportData, Scored

SIDES = (160, 112, 80, 56, 40)  # longest side of an answer's picture; the first that fits is taken
BUDGET = 6_000_000  # bytes of all pictures of a page together
PIXELATED = 64  # up to this side a picture is enlarged with hard pixel edges


class Pictures:
    """The data URI of every picture on a page; each is encoded once, and counted as often as shown.

    A query's picture is shown larger than an answer's, so it keeps twice the pixels.
    """

    def __init__(self, data: ReportData) -> None:
        large = [example for example in _large(data) if example.image is not None]
        small = [example for example in _small(data) if example.image is not None]
        native = max((max(_shape(e)) for e in large + small), default=0)
        for side in SIDES[:1] + tuple(s for s in SIDES[1:] if s < native):
            self._uris = {id(e): _uri(e, side) for e in {id(e): e for e in small}.values()}
            self._uris |= {id(e): _uri(e, 2 * side) for e in large}
            if sum(len(self._uris[id(example)]) for example in large + small) <= BUDGET:
                break

    def uri(self, example: Example) -> str:
        """The ``data:image/png`` URI of an example that has a picture."""
        return self._uris[id(example)]


def pixelated(example: Example) -> bool:
    """Whether the picture is so small that smoothing it would only blur it."""
    return max(_shape(example)) <= PIXELATED


def _shape(example: Example) -> tuple[int, ...]:
    return (0, 0) if example.image is None else example.image.shape[:2]


def _large(data: ReportData) -> Iterable[Example]:
    return (query.example for query in data.queries)


def _small(data: ReportData) -> Iterable[Example]:
    answers: list[Scored] = [*data.suspects, *data.valuable, *data.harmful, *data.highest_loss]
    if data.decisions is not None:
        yield from data.decisions.examples()
    if data.difference is not None:
        yield from (moved.example for moved in data.difference.moved)
    for query in data.queries:
        answers += [*query.proponents, *query.opponents, *query.nearest]
    yield from (scored.example for scored in answers)


def png(image: np.ndarray, side: int) -> bytes:
    """An image, uint8 [H, W] or [H, W, 3], made to fit a square of ``side`` pixels."""
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG")
    return file.getvalue()


def _uri(example: Example, side: int) -> str:
    assert example.image is not None
    return "data:image/png;base64," + base64.b64encode(png(example.image, side)).decode("ascii")
