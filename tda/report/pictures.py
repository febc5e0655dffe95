"""Pictures as PNG data URIs, small enough that a page of them stays small."""

from __future__ import annotations

import base64
import io
from collections.abc import Iterable

import numpy as np
from PIL import Image

from tda.report.data import Example, ReportData, Scored

SIDES = (160, 112, 80, 56, 40)  # longest side of a picture in pixels; the first that fits is taken
BUDGET = 6_000_000  # bytes of all pictures of a page together
PIXELATED = 64  # up to this side a picture is enlarged with hard pixel edges


class Pictures:
    """The data URI of every picture on a page, each encoded once."""

    def __init__(self, data: ReportData) -> None:
        shown = list(_large(data)), list(_small(data))
        for side in SIDES:
            self._uris = {
                id(example): _uri(example.image, limit)
                for examples, limit in zip(shown, (2 * side, side), strict=True)
                for example in examples
                if example.image is not None
            }
            if sum(map(len, self._uris.values())) <= BUDGET:
                break

    def uri(self, example: Example) -> str:
        """The ``data:image/png`` URI of an example that has a picture."""
        return self._uris[id(example)]


def pixelated(example: Example) -> bool:
    """Whether the picture is so small that smoothing it would only blur it."""
    return example.image is not None and max(example.image.shape[:2]) <= PIXELATED


def _large(data: ReportData) -> Iterable[Example]:
    return (query.example for query in data.queries)


def _small(data: ReportData) -> Iterable[Example]:
    answers: list[Scored] = [*data.suspects, *data.valuable, *data.harmful, *data.highest_loss]
    for query in data.queries:
        answers += [*query.proponents, *query.opponents, *query.nearest]
    return (scored.example for scored in answers)


def _uri(image: np.ndarray, side: int) -> str:
    picture = Image.fromarray(np.ascontiguousarray(image))
    picture.thumbnail((side, side), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(file.getvalue()).decode("ascii")
