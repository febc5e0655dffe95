"""The HTTP API: the same questions as the pages', for programs. Its schema is /api/openapi.json."""

from __future__ import annotations

from typing import Annotated, Any, Literal, NamedTuple

import numpy as np
from fastapi import APIRouter, Depends, Path, Query, Response

from tda.decisions import Marks, as_csv
from tda.explorer.asking import Explorer, Question, Ranked, Search, extremes
from tda.explorer.comparing import compare, group_view
from tda.explorer.faults import fault_of
from tda.explorer.library import AbsentError, Keep, Order, Shelf
from tda.explorer.schema import (
    MAX_K,
    MAX_NAME,
    AnswerOut,
    ComparisonOut,
    ExampleOut,
    Fault,
    GroupOut,
    GroupsOut,
    LayersOut,
    MarkIn,
    MarkOut,
    QueriesOut,
    QueryIn,
    QueryOut,
    RankedOut,
    ReachOut,
    RecipeOut,
    RunOut,
    ScoredOut,
    SideOut,
)
from tda.explorer.shown import Shown, decide, listed_marks, mark_out
from tda.explorer.uploads import add_query, kinds
from tda.report.pictures import png

Name = Annotated[str, Path(max_length=MAX_NAME, description="A query set.")]
Index = Annotated[int, Path(ge=0)]
RecipeName = Annotated[str | None, Query(max_length=MAX_NAME, description="Default: the run's.")]
Damping = Annotated[
    Annotated[float, Query(ge=0, allow_inf_nan=False)] | Literal["auto"],
    Query(description="A multiple of the curvature's mean eigenvalue, or auto."),
]
Depth = Annotated[int | None, Query(ge=1, le=MAX_K, description="Examples per side.")]
Value = Annotated[str | None, Query(max_length=MAX_NAME)]
PageNumber = Annotated[int, Query(ge=1, le=10**9)]
PageSize = Annotated[int, Query(ge=1, le=500)]
Side = Annotated[int, Query(ge=16, le=1024, description="Longest side in pixels.")]
FAULTS: dict[int | str, dict[str, Any]] = {
    status: {"model": Fault} for status in (401, 403, 404, 409, 413, 422, 503)
}


def keep_of(source: Value = None, group: Value = None, label: Value = None) -> Keep:
    """The filters of a request."""
    return Keep(source, group, label)


Kept = Annotated[Keep, Depends(keep_of)]


class Method(NamedTuple):
    """What a request says of the method it wants."""

    recipe: str | None
    damping: float | Literal["auto"]


def method_of(recipe: RecipeName = None, damping: Damping = "auto") -> Method:
    """The method of a request."""
    return Method(recipe, damping)


Asked = Annotated[Method, Depends(method_of)]


def router(explorer: Explorer, marks: Marks) -> APIRouter:
    """Every route under /api."""
    api = APIRouter(prefix="/api", responses=FAULTS)
    _describe(api, explorer, marks)
    shown = Shown(explorer, marks)
    _ask(api, explorer, shown)
    _look_up(api, explorer, shown)
    _mark(api, explorer, marks)
    _pictures(api, explorer)
    return api


def run_card(explorer: Explorer) -> RunOut:
    """What is served, for the API and for the page about it."""
    library = explorer.library
    sets = {name: library.queries(name).num_rows for name in library.query_sets()}
    return RunOut(
        run=explorer.path.resolve().name,
        num_train=library.train.num_rows,
        num_checkpoints=library.train.table.num_checkpoints,
        query_sets=sets,
        default_recipe=explorer.defaults.recipe,
        default_k=explorer.defaults.k,
        layers=[name for name, _ in explorer.layers],
        choices=library.train.choices(),
        uploads=list(kinds(explorer)),
        exact=explorer.fits,
        manifest=explorer.store.manifest,
    )


def _describe(api: APIRouter, explorer: Explorer, marks: Marks) -> None:
    shown = Shown(explorer, marks)

    @api.get("/run")
    def run() -> RunOut:
        """The card of the run."""
        return run_card(explorer)

    @api.get("/recipes")
    def recipes() -> list[RecipeOut]:
        """Every method, and whether this run can answer with it."""
        found = explorer.obstacles()
        return [
            RecipeOut(
                name=name,
                summary=recipe.summary,
                formula=recipe.formula,
                explained=recipe.explain(),
                reference=recipe.reference,
                has_damping=recipe.curvature != "identity",
                available=found[name] is None,
                obstacle=None if (error := found[name]) is None else fault_of(error),
            )
            for name, recipe in explorer.recipes.items()
        ]

    @api.get("/sets/{name}/queries")
    def queries(
        name: Name,
        search: Annotated[str, Query(max_length=MAX_NAME)] = "",
        order: Order = "position",
        page: PageNumber = 1,
        size: PageSize = 50,
    ) -> QueriesOut:
        """Queries of a set whose id or text contains, or whose label is, ``search``."""
        shelf = explorer.library.queries(name)
        found = shelf.found(search, order)
        here = found[(page - 1) * size : page * size].tolist()
        listed = [shown.query(shelf, index) for index in here]
        return QueriesOut(total=len(found), page=page, size=size, queries=listed)

    @api.get("/train/{index}")
    def train_example(index: Index) -> ExampleOut:
        """One training example."""
        return shown.train(index)


def _ask(api: APIRouter, explorer: Explorer, shown: Shown) -> None:
    def answered(question: Question, k: int, keep: Keep, search: Search) -> AnswerOut:
        answer = explorer.answer(question, k, keep, search)
        shelf = explorer.require(question)
        return AnswerOut(
            query_set=question.query_set,
            query=None if question.query is None else shown.query(shelf, question.query),
            recipe=question.recipe.name,
            explained=question.recipe.explain(),
            damping=list(explorer.damping_used(question.query_set, question.recipe)),
            num_kept=answer.num_kept,
            recall=answer.recall,
            seconds=answer.seconds,
            proponents=shown.ranked(answer.proponents, explorer.signs(question, answer.proponents)),
            opponents=shown.ranked(answer.opponents, explorer.signs(question, answer.opponents)),
        )

    @api.get("/sets/{name}/queries/{index}")
    def query(
        name: Name,
        index: Index,
        keep: Kept,
        method: Asked,
        k: Depth = None,
        search: Search = "auto",
    ) -> AnswerOut:
        """The training examples most for and most against one query."""
        question = Question(name, index, shown.recipe(*method))
        return answered(question, k or explorer.defaults.k, keep, search)

    @api.get("/sets/{name}/values")
    def values(name: Name, keep: Kept, method: Asked, k: Depth = None) -> AnswerOut:
        """The training examples most for and against a whole set: scores are means over it."""
        question = Question(name, None, shown.recipe(*method))
        return answered(question, k or explorer.defaults.k, keep, "exact")

    @api.get("/sets/{name}/queries/{index}/layers")
    def layers(name: Name, index: Index, keep: Kept, method: Asked, k: Depth = None) -> LayersOut:
        """What each layer gives to the scores of the examples that the same question shows."""
        question = Question(name, index, shown.recipe(*method))
        answer = explorer.answer(question, k or explorer.defaults.k, keep)
        indices = np.concatenate([answer.proponents.indices, answer.opponents.indices])
        scores = explorer.by_layer(question, indices)
        names = [layer for layer, _ in explorer.layers]
        return LayersOut(layers=names, indices=indices.tolist(), scores=scores.tolist())

    @api.get("/sets/{name}/queries/{index}/comparison")
    def comparison(
        name: Name,
        index: Index,
        method: Asked,
        other: Annotated[str, Query(max_length=MAX_NAME, description="The other recipe.")],
        other_damping: Damping = "auto",
        k: Depth = None,
    ) -> ComparisonOut:
        """Two recipes side by side: overlap of the k strongest, rank correlation of all scores."""
        left, right = shown.recipe(*method), shown.recipe(other, other_damping)
        depth = k or explorer.defaults.k
        found = compare(explorer, Question(name, index, left), right, depth)
        sides = [
            SideOut(
                recipe=of.name,
                damping=list(explorer.damping_used(name, of)),
                proponents=shown.ranked(ranked[0]),
                opponents=shown.ranked(ranked[1]),
            )
            for of, ranked in ((left, found.left), (right, found.right))
        ]
        return ComparisonOut(
            left=sides[0],
            right=sides[1],
            k=depth,
            overlap_proponents=found.overlap[0],
            overlap_opponents=found.overlap[1],
            chance=found.chance,
            spearman=found.spearman,
            num_train=found.num_train,
        )

    @api.get("/sets/{name}/groups")
    def groups(
        name: Name,
        method: Asked,
        query: Annotated[int | None, Query(ge=0, description="Default: all of the set.")] = None,
    ) -> list[GroupsOut]:
        """Shares of influence by source, group and label, for one query or the mean of all."""
        question = Question(name, query, shown.recipe(*method))
        return [
            GroupsOut(
                column=found.column,
                groups=[GroupOut.model_validate(vars(group)) for group in found.groups],
            )
            for found in group_view(explorer, question)
        ]


def _look_up(api: APIRouter, explorer: Explorer, shown: Shown) -> None:
    @api.get("/self-influence")
    def self_influence(
        keep: Kept, method: Asked, page: PageNumber = 1, size: PageSize = 50
    ) -> RankedOut:
        """Training examples by their score for themselves: outliers and wrong labels come first."""
        chosen = shown.recipe(*method)
        order, values = explorer.by_self_influence(chosen, keep), explorer.self_influence(chosen)
        here = order[(page - 1) * size : page * size]
        return RankedOut(
            total=len(order),
            page=page,
            size=size,
            mean=float(np.mean(values, dtype=np.float64)),
            examples=shown.ranked(Ranked(here, values[here])),
        )

    @api.get("/train/{index}/reach")
    def reach(
        index: Index,
        queries: Annotated[str, Query(max_length=MAX_NAME, description="A query set.")],
        method: Asked,
        k: Depth = None,
    ) -> ReachOut:
        """The queries that one training example helps and hurts most."""
        scores = explorer.reach(queries, shown.recipe(*method), index)
        shelf = explorer.library.queries(queries)
        sides = []
        for side, sign in zip(extremes(scores, k or explorer.defaults.k), (1, -1), strict=True):
            each = zip(side.indices.tolist(), side.scores.tolist(), strict=True)
            pairs = ((i, score) for i, score in each if sign * score > 0)
            sides.append([ScoredOut(example=shown.query(shelf, i), score=s) for i, s in pairs])
        return ReachOut(helped=sides[0], hurt=sides[1])

    @api.post("/queries", status_code=201)
    def new_query(given: QueryIn) -> QueryOut:
        """Featurize and store a new query; the same query again gives the same set."""
        name = add_query(explorer, given.kind, given.value, given.label)
        shelf = explorer.library.queries(name)
        return QueryOut(query_set=name, query=shown.query(shelf, 0), page=f"/?set={name}&query=0")


def _mark(api: APIRouter, explorer: Explorer, marks: Marks) -> None:
    @api.get("/marks")
    def all_marks() -> list[MarkOut]:
        """Every mark that holds, newest first."""
        return [mark_out(mark, index) for mark, index in listed_marks(explorer, marks)]

    @api.get("/marks.csv", response_class=Response, responses={200: {"content": {"text/csv": {}}}})
    def csv_marks() -> Response:
        """The marks as CSV. A cell that a spreadsheet would run as a formula starts with '."""
        text = as_csv([mark for mark, _ in listed_marks(explorer, marks)])
        return Response(
            text.encode("utf-8", "replace"),
            media_type="text/csv; charset=utf-8",
            headers={"content-disposition": 'attachment; filename="marks.csv"'},
        )

    @api.post("/marks", status_code=201)
    def mark(given: MarkIn) -> MarkOut:
        """Mark a training example: relabel, remove, keep, or none to withdraw."""
        return decide(explorer, marks, given)


def _pictures(api: APIRouter, explorer: Explorer) -> None:
    def picture(shelf: Shelf, index: int, side: int) -> Response:
        example = shelf.example(index)
        if example.image is None:
            raise AbsentError("this example has no picture", found=example.id)
        headers = {"cache-control": "private, max-age=600"}
        return Response(png(example.image, side), media_type="image/png", headers=headers)

    png_only: dict[int | str, dict[str, Any]] = {200: {"content": {"image/png": {}}}}

    @api.get("/train/{index}/image", response_class=Response, responses=png_only)
    def train_picture(index: Index, side: Side = 160) -> Response:
        """A training example's picture."""
        return picture(explorer.library.train, index, side)

    @api.get("/sets/{name}/queries/{index}/image", response_class=Response, responses=png_only)
    def query_picture(name: Name, index: Index, side: Side = 320) -> Response:
        """A query's picture."""
        return picture(explorer.library.queries(name), index, side)
