"""Examples and marks on their way out, each with what the reader needs beside it."""

from __future__ import annotations

import math
from typing import Literal

from tda.decisions import Mark, Marks
from tda.explorer.asking import Explorer, Ranked
from tda.explorer.library import Shelf
from tda.explorer.schema import ExampleOut, MarkIn, MarkOut, ScoredOut
from tda.recipe import Recipe
from tda.report.data import Example


class Shown:
    """Examples on their way out, with their marks and the address of their picture."""

    def __init__(self, explorer: Explorer, marks: Marks) -> None:
        self.explorer = explorer
        self.marks = marks

    def recipe(self, name: str | None, damping: float | Literal["auto"]) -> Recipe:
        return self.explorer.recipe(name or self.explorer.defaults.recipe, damping)

    def train(self, index: int) -> ExampleOut:
        shelf = self.explorer.library.train
        example = shelf.example(index)
        mark = self.marks.all().get(shelf.stored_id(index))
        found = _example(example, f"/api/train/{index}/image")
        return found if mark is None else found.model_copy(update={"mark": mark_out(mark, index)})

    def query(self, shelf: Shelf, index: int) -> ExampleOut:
        name = shelf.table.name.removeprefix("queries/")
        return _example(shelf.example(index), f"/api/sets/{name}/queries/{index}/image")

    def ranked(self, ranked: Ranked, signs: list[bool] | None = None) -> list[ScoredOut]:
        indices, scores = ranked.indices.tolist(), ranked.scores.tolist()
        sure: list[bool | None] = [None] * len(indices) if signs is None else [*signs]
        each = zip(indices, scores, sure, strict=True)
        return [ScoredOut(example=self.train(i), score=s, reliable=r) for i, s, r in each]


def _example(example: Example, picture: str) -> ExampleOut:
    row = example.row
    return ExampleOut(
        index=example.index,
        id=example.id,
        label=example.label,
        source=example.source,
        group=example.group,
        text=example.text,
        row=None if row is None else [x if math.isfinite(x) else None for x in row],
        image=None if example.image is None else picture,
        loss=example.loss,
        p=example.p,
    )


def mark_out(mark: Mark, index: int | None) -> MarkOut:
    return MarkOut(
        id=mark.id,
        action=mark.action,
        label=mark.label,
        note=mark.note,
        at=mark.at,
        revision=mark.revision,
        index=index,
    )


def listed_marks(explorer: Explorer, marks: Marks) -> list[tuple[Mark, int | None]]:
    """Every mark, newest first, with its example's position (None: the run has no such id).

    Those of deleted examples are left out; they are kept, should one come back.
    """
    shelf = explorer.library.train
    known, deleted = marks.all(), set(shelf.store.deleted.tolist())
    shown = [known[name] for name in reversed(known) if name not in deleted]
    return [(mark, shelf.index_of(mark.id) if shelf.has(mark.id) else None) for mark in shown]


def decide(explorer: Explorer, marks: Marks, given: MarkIn) -> MarkOut:
    """Mark a training example of the run. Raises AbsentError, ConflictError, StoreError."""
    shelf = explorer.library.train
    index = given.index if given.index is not None else shelf.index_of(given.id or "")
    label = given.label if given.action == "relabel" else None
    mark = marks.set(shelf.stored_id(index), given.action, label, given.note, given.revision)
    return mark_out(mark, index)
