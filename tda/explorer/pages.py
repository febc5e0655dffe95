"""The pages: complete as the server sends them; explorer.js only makes them quicker to use."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any
from urllib.parse import parse_qsl

import numpy as np
from fastapi import APIRouter, Query, Request
from fastapi.responses import FileResponse, HTMLResponse, RedirectResponse, Response
from pydantic import ValidationError
from starlette.concurrency import run_in_threadpool

import tda.report
from tda.decisions import Mark, Marks
from tda.errors import DataError, TdaError
from tda.explorer.api import run_card
from tda.explorer.asking import Explorer, Question, Ranked, Search, extremes
from tda.explorer.comparing import compare, group_view
from tda.explorer.faults import fault_of, status_of
from tda.explorer.library import AbsentError, Shelf
from tda.explorer.schema import Fault, MarkIn
from tda.explorer.shown import decide, listed_marks
from tda.explorer.state import Asked
from tda.explorer.uploads import kinds
from tda.recipe import Recipe
from tda.report.data import Example, Scored
from tda.report.page import environment

_HERE = Path(__file__).parent
STATIC = {
    "report.css": Path(tda.report.__file__).parent / "page.css",
    "explorer.css": _HERE / "static" / "explorer.css",
    "explorer.js": _HERE / "static" / "explorer.js",
}
PICKED = 40  # queries in one page of the picker
LISTED = 50
Chosen = Annotated[Asked, Query()]


@dataclass(frozen=True)
class Addresses:
    """Where a table's pictures are, as the report's templates ask for them."""

    prefix: str
    side: int

    def uri(self, example: Example) -> str:
        return f"{self.prefix}/{example.index}/image?side={self.side}"


class Pages:
    """Everything a template is given, for one request at a time."""

    def __init__(self, explorer: Explorer, marks: Marks) -> None:
        self.explorer = explorer
        self.marks = marks
        self._environment = environment(_HERE / "templates")
        self._environment.filters["log10"] = math.log10

    # ---- what is asked

    def completed(self, asked: Asked) -> Asked:
        """With the query set and the query that a page shows when none is named."""
        known = self.explorer.library.query_sets()
        if not known:
            raise AbsentError(
                "this run has no query set",
                where=self.explorer.path,
                do="add one with run.add_queries(dataset, name), or name it in the configuration",
            )
        name = asked.set or known[0]
        shelf = self.explorer.library.queries(name)
        query = asked.query
        if query is None:
            found = shelf.found(asked.search, asked.order)
            query = int(found[0]) if len(found) else "all"
        return asked.model_copy(update={"set": name, "query": query})

    def recipe(self, asked: Asked) -> Recipe:
        """A damping that the recipe has no use for is left aside: it waits for one that has."""
        return self._damped(asked.recipe or self.explorer.defaults.recipe, asked.damping)

    def _damped(self, name: str, damping: Any) -> Recipe:
        useless = self.explorer.recipe(name).curvature == "identity"
        return self.explorer.recipe(name, "auto" if useless else damping)

    def other(self, asked: Asked) -> Recipe:
        """The recipe to compare with: one that this run can answer with."""
        if asked.other is not None:
            return self._damped(asked.other, asked.other_damping)
        free = [name for name, fault in self.explorer.obstacles().items() if fault is None]
        mine = asked.recipe or self.explorer.defaults.recipe
        wanted = [name for name in ("trak", "grad_cos", *free) if name in free and name != mine]
        return self._damped(wanted[0] if wanted else mine, asked.other_damping)

    def question(self, asked: Asked) -> Question:
        assert asked.set is not None
        query = None if asked.query in ("all", None) else int(asked.query)
        return Question(asked.set, query, self.recipe(asked))

    def depth(self, asked: Asked) -> int:
        return asked.k or self.explorer.defaults.k

    # ---- what is shown

    def scored(self, ranked: Ranked, shelf: Shelf | None = None) -> tuple[Scored, ...]:
        shelf = shelf or self.explorer.library.train
        return shelf.gallery.scored(ranked.indices.tolist(), ranked.scores)

    def answered(self, question: Question, ranked: Ranked) -> tuple[Scored, ...]:
        """The same of an answer, with what is known of the signs."""
        found, signs = self.scored(ranked), self.explorer.signs(question, ranked)
        if signs is None:
            return found
        return tuple(replace(x, reliable=sure) for x, sure in zip(found, signs, strict=True))

    def marked(self, *lists: tuple[Scored, ...]) -> dict[int, Mark]:
        """The marks of the training examples shown, by position."""
        known = self.marks.all()
        if not known:
            return {}
        indices = sorted({scored.example.index for shown in lists for scored in shown})
        names = self.explorer.library.train.table.entries("id", indices).tolist()
        return {i: known[name] for i, name in zip(indices, names, strict=True) if name in known}

    def picker(self, asked: Asked) -> dict[str, Any]:
        """The queries of the set, a page of them; and the ones before and after the one shown."""
        assert asked.set is not None
        shelf = self.explorer.library.queries(asked.set)
        found = shelf.found(asked.search, asked.order)
        page = min(asked.page, max(1, -(-len(found) // PICKED)))
        place = np.flatnonzero(found == asked.query) if asked.query != "all" else np.empty(0, int)
        at = int(place[0]) if len(place) else None
        if "page" not in asked.model_fields_set and at is not None:
            page = at // PICKED + 1
        here = found[(page - 1) * PICKED : page * PICKED].tolist()

        def neighbour(step: int) -> tuple[int, int] | None:
            to = 0 if at is None else at + step
            return (int(found[to]), to // PICKED + 1) if 0 <= to < len(found) else None

        return {
            "total": len(found),
            "page": page,
            "num_pages": max(1, -(-len(found) // PICKED)),
            "listed": [shelf.example(index) for index in here],
            "before": neighbour(-1),
            "after": neighbour(1),
            "position": None if at is None else at + 1,
        }

    def render(
        self, name: str, request: Request, asked: Asked, status: int = 200, **more: Any
    ) -> HTMLResponse:
        explorer, train = self.explorer, self.explorer.library.train
        recipe = asked.recipe or explorer.defaults.recipe
        context = {
            "path": request.url.path,
            "asked": asked,
            "link": asked.link,
            "run": explorer.path.resolve().name,
            "num_train": train.num_rows,
            "sets": explorer.library.query_sets(),
            "recipes": explorer.recipes,
            "obstacles": explorer.obstacles(),
            "recipe_name": recipe,
            "choices": train.choices(),
            "depth": self.depth(asked),
            "uploads": kinds(explorer),
            "has_classes": train.gallery.classes,
            "train_pictures": Addresses("/api/train", 160),
            "query_pictures": Addresses(f"/api/sets/{asked.set}/queries", 320),
            "tiny_pictures": Addresses(f"/api/sets/{asked.set}/queries", 64),
            "fault": None,
            "marked": {},
            **more,
        }
        return HTMLResponse(self._environment.get_template(name).render(context), status)

    def fault(self, request: Request, status: int, fault: Fault) -> str:
        """A page that says what is wrong, whatever is; it needs nothing of the run."""
        template = self._environment.get_template("fault.html.j2")
        return template.render(
            fault=fault, status=status, run=self.explorer.path.resolve().name, path=request.url.path
        )


def router(explorer: Explorer, marks: Marks, pages: Pages) -> APIRouter:
    """Every page, and the files they are made with."""
    found = APIRouter(include_in_schema=False)
    _questions(found, explorer, pages)
    _examples(found, explorer, marks, pages)

    @found.get("/static/{name}")
    def static(name: str) -> Response:
        if name not in STATIC:
            raise AbsentError("there is no such file", found=name)
        return FileResponse(STATIC[name], headers={"cache-control": "no-cache"})

    return found


Shown = Callable[[Asked], dict[str, Any]]


def _questions(found: APIRouter, explorer: Explorer, pages: Pages) -> None:
    def page(template: str, request: Request, asked: Asked, shown: Shown) -> HTMLResponse:
        """A page about a question. What stands in the way of an answer is said in its place, with
        the controls around it: another recipe may do."""
        asked = pages.completed(asked)
        picker = pages.picker(asked)
        try:
            assert asked.set is not None
            shelf = explorer.require(pages.question(asked))
            query = None if asked.query == "all" else shelf.example(int(asked.query or 0))
            more = {"query": query, **shown(asked)}
            return pages.render(template, request, asked, picker=picker, **more)
        except TdaError as error:
            fault, status = fault_of(error), status_of(error)
            return pages.render("ask.html.j2", request, asked, status, picker=picker, fault=fault)

    def answered(asked: Asked) -> dict[str, Any]:
        question, depth = pages.question(asked), pages.depth(asked)
        search: Search = "exact" if asked.exact else "auto"
        answer = explorer.answer(question, depth, asked.keep, search)
        sides = answer.proponents, answer.opponents
        for_, against = (pages.answered(question, side) for side in sides)
        rule = explorer.sign_rule(question.recipe)
        layers = None
        if explorer.layers and question.query is not None:
            layers = _layers(explorer, question, answer.proponents, answer.opponents)
        return {
            "answer": answer,
            "proponents": for_,
            "opponents": against,
            "recipe": question.recipe,
            "damping": explorer.damping_used(question.query_set, question.recipe),
            "layers": layers,
            "signs": rule.says if rule.tells else "",
            "marked": pages.marked(for_, against),
        }

    def grouped(asked: Asked) -> dict[str, Any]:
        question = pages.question(asked)
        return {"groups": group_view(explorer, question), "recipe": question.recipe}

    def compared(asked: Asked) -> dict[str, Any]:
        question, other = pages.question(asked), pages.other(asked)
        result = compare(explorer, question, other, pages.depth(asked))
        sides: list[tuple[Recipe, tuple[Scored, ...], tuple[Scored, ...]]] = []
        for of, ranked in ((question.recipe, result.left), (other, result.right)):
            helped, hurt = (
                _signed(pages.scored(x), n) for x, n in zip(ranked, (1, -1), strict=True)
            )
            sides.append((of, helped, hurt))
        both = [_common([side[1] for side in sides]), _common([side[2] for side in sides])]
        marked = pages.marked(*(shown for _, *two in sides for shown in two))
        return {"result": result, "sides": sides, "both": both, "other": other, "marked": marked}

    @found.get("/")
    def ask(request: Request, asked: Chosen) -> HTMLResponse:
        return page("ask.html.j2", request, asked, answered)

    @found.get("/groups")
    def groups(request: Request, asked: Chosen) -> HTMLResponse:
        return page("groups.html.j2", request, asked, grouped)

    @found.get("/compare")
    def comparison(request: Request, asked: Chosen) -> HTMLResponse:
        return page("compare.html.j2", request, asked, compared)


def _common(lists: list[tuple[Scored, ...]]) -> set[int]:
    """Positions of the examples that all lists hold."""
    return set.intersection(*({scored.example.index for scored in shown} for shown in lists))


def _signed(shown: tuple[Scored, ...], sign: int) -> tuple[Scored, ...]:
    return tuple(scored for scored in shown if sign * scored.score > 0)


def _layers(
    explorer: Explorer, question: Question, *sides: Ranked
) -> list[tuple[str, list[float]]]:
    """(layer, its part of the sum of the scores shown on either side)."""
    sums = [explorer.by_layer(question, side.indices).sum(1) for side in sides]
    each = zip(explorer.layers, *sums, strict=True)
    return [(name, [float(part) for part in parts]) for (name, _), *parts in each]


def _examples(found: APIRouter, explorer: Explorer, marks: Marks, pages: Pages) -> None:
    @found.get("/self-influence")
    def self_influence(request: Request, asked: Chosen) -> HTMLResponse:
        try:
            recipe = pages.recipe(asked)
            order = explorer.by_self_influence(recipe, asked.keep)
            values = explorer.self_influence(recipe)
        except TdaError as error:
            more: dict[str, Any] = {"fault": fault_of(error), "shown": (), "total": 0}
            return pages.render("self.html.j2", request, asked, status_of(error), **more)
        here = order[(asked.page - 1) * LISTED : asked.page * LISTED]
        shown = pages.scored(Ranked(here, values[here]))
        more = {
            "shown": shown,
            "recipe": recipe,
            "total": len(order),
            "num_pages": max(1, -(-len(order) // LISTED)),
            "mean": float(np.mean(values, dtype=np.float64)),
            "marked": pages.marked(shown),
        }
        return pages.render("self.html.j2", request, asked, **more)

    @found.get("/train/{index}")
    def example(request: Request, index: int, asked: Chosen) -> HTMLResponse:
        shown = explorer.library.train.example(index)
        alone = (Scored(shown, 0.0),)
        more: dict[str, Any] = {"example": shown, "marked": pages.marked(alone), "sides": None}
        status = 200
        try:
            asked = pages.completed(asked)
            scores = explorer.reach(asked.set or "", pages.recipe(asked), index)
            shelf = explorer.library.queries(asked.set or "")
            ranked = extremes(scores, pages.depth(asked))
            each = zip(ranked, (1, -1), strict=True)
            more["sides"] = [_signed(pages.scored(x, shelf), sign) for x, sign in each]
            more["recipe"] = pages.recipe(asked)
        except TdaError as error:
            more["fault"], status = fault_of(error), status_of(error)
        return pages.render("example.html.j2", request, asked, status, **more)

    @found.post("/marks")
    async def mark(request: Request) -> Response:
        """The form of an example's page, where there is no JavaScript."""
        body = (await request.body()).decode("utf-8", "replace")
        fields = {name: value for name, value in parse_qsl(body) if value != ""}
        given = functools.partial(_mark_of, fields)
        done = await run_in_threadpool(lambda: decide(explorer, marks, given()))
        return RedirectResponse(f"/train/{done.index}", 303)

    @found.get("/marks")
    def all_marks(request: Request, asked: Chosen) -> HTMLResponse:
        listed = listed_marks(explorer, marks)
        shelf = explorer.library.train
        here = [(mark, None if i is None else shelf.example(i)) for mark, i in listed]
        return pages.render("marks.html.j2", request, asked, listed=here)

    @found.get("/run")
    def card(request: Request, asked: Chosen) -> HTMLResponse:
        routes = request.app.openapi()["paths"]
        return pages.render("run.html.j2", request, asked, card=run_card(explorer), routes=routes)

    @found.get("/new")
    def new(request: Request, asked: Chosen) -> HTMLResponse:
        return pages.render("new.html.j2", request, asked)


def _mark_of(fields: dict[str, str]) -> MarkIn:
    try:
        return MarkIn.model_validate(fields)
    except ValidationError as error:
        raise DataError(
            "this mark is not valid", found=error.errors()[0]["msg"].removeprefix("Value error, ")
        ) from error
