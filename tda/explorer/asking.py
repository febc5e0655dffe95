"""Questions to a run, answered in the time of a glance: what is costly is done once and held.

    score[q, i] = Σ_c ⟨Q_c[q], x_{i,c}⟩ · r[c, i]

The stored rows x are held in memory where they fit; Q and r by (recipe, damping, query set); the
scores [train] of a question by the question. The answer, its groups, its layers and its agreement
with another recipe are then read off.
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from threading import Lock
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from tda import scorer
from tda.config import QuerySection
from tda.errors import RecipeError, TdaError
from tda.explorer.held import Held
from tda.explorer.library import AbsentError, Keep, Library, Shelf, require_train
from tda.recipe import Recipe
from tda.recipe.requirements import (
    LAYERS_APART,
    checkpoint_weights,
    curvature_table,
    layer_slices,
    require_rows,
    segments,
)
from tda.recipes import RECIPES
from tda.recipes.auto import AUTO
from tda.run import Run
from tda.scorer import Prepared
from tda.scorer.candidates import SAMPLE, RowIndex
from tda.scorer.ranking import Heaps, clipped
from tda.scorer.signs import SignRule, signs_survive
from tda.store import Store
from tda.store.files import Place

Search = Literal["auto", "exact", "approximate"]
ROW_BYTES = 2 * 2**30  # of float32 rows held in memory; with more, the rows are read at each scan
HELD_BYTES = 2**30  # of prepared queries, scores and answers
TILE_BYTES = 4 * 2**20  # of rows made float64 at once: they stay in the cache of a core


@dataclass(frozen=True)
class Question:
    """One query under one recipe. ``query`` None: the mean over the whole set, so that scores are
    the values a report gives."""

    query_set: str
    query: int | None
    recipe: Recipe

    def using(self, recipe: Recipe) -> Question:
        return replace(self, recipe=recipe)


@dataclass(frozen=True)
class Ranked:
    """Training examples by score, the strongest first."""

    indices: np.ndarray  # [k] int64
    scores: np.ndarray  # [k] float32


@dataclass(frozen=True)
class Answer:
    """Proponents (score > 0) and opponents (score < 0) among ``num_kept`` training examples."""

    proponents: Ranked
    opponents: Ranked
    num_kept: int
    seconds: float
    recall: float | None = None  # measured, of an approximate search; None for an exact one


class Explorer:
    """A run and what is held of it between questions. Safe to use from many threads.

    run: as opened, with its task where uploaded queries shall be featurized. defaults: recipe and
    k where none is asked for. make_example: see ``[serve] example`` of a configuration.
    Raises StoreError where nothing is indexed.
    """

    def __init__(
        self, run: Run, defaults: QuerySection | None = None, make_example: Any = None
    ) -> None:
        require_train(run.path)
        self.run = run
        self.defaults = defaults or QuerySection()
        run.recipe(self.defaults.recipe)  # an unknown name is an error now, not at the first page
        self.make_example = make_example
        self.library = Library(run.path)
        self.writing = Lock()  # one upload at a time
        self._held = Held(HELD_BYTES)
        self._rows = Held(ROW_BYTES)
        self._scanning = Lock()  # two scans at once take as long as one after the other

    @property
    def path(self) -> Place:
        return self.run.path

    @property
    def store(self) -> Store:
        return self.library.train.store

    @property
    def _source(self) -> Store:
        """What scores are computed from."""
        return cast(Store, self.library)

    # ---- recipes

    @property
    def recipes(self) -> dict[str, Recipe]:
        """Every recipe by name, and before them "auto": the one that suits this run best."""
        return {AUTO: self.run.recipe(AUTO), **RECIPES}

    def recipe(self, name: str, damping: float | Literal["auto"] = "auto") -> Recipe:
        """A recipe by name with a damping of its own. Raises RecipeError."""
        recipe = self.run.recipe(name)
        return recipe if damping == "auto" else replace(recipe, damping=damping)

    def obstacle(self, recipe: Recipe) -> TdaError | None:
        """Why this run cannot answer with a recipe; None if it can."""
        store = self.store
        try:
            require_rows(store.manifest, recipe)
            checkpoint_weights(store.manifest, recipe)
            if recipe.function == "unrolled":
                segments(store.manifest, recipe)
            if recipe.by_layer:
                layer_slices(store.manifest, recipe)
            if recipe.curvature != "identity" and recipe.curvature_rows == "gauss_newton":
                curvature_table(store, recipe)
        except TdaError as error:
            return error
        return None

    def obstacles(self) -> dict[str, TdaError | None]:
        """Every recipe's name with what is in its way."""
        key = ("obstacles", self.library.stamp("train"), self.library.stamp("curvature"))
        return self._held.get(
            key, lambda: {name: self.obstacle(recipe) for name, recipe in self.recipes.items()}
        )

    # ---- scores

    def prepared(self, query_set: str, recipe: Recipe) -> Prepared:
        """The whole query set under a recipe, and r of every training row."""
        shelf = self.library.queries(query_set)
        key = ("prepared", self.library.train.stamp, shelf.table.name, shelf.stamp, recipe)
        return self._held.get(key, lambda: scorer.prepare(self._source, recipe, shelf.table))

    def damping_used(self, query_set: str, recipe: Recipe) -> tuple[float, ...]:
        """λ of every checkpoint; empty without a curvature."""
        return self.prepared(query_set, recipe).damping

    def scores(self, question: Question) -> np.ndarray:
        """Exact scores of every training example [train] float32."""
        self.require(question)
        return self._held.get(self._key("scores", question), lambda: self._scan(question))

    def require(self, question: Question) -> Shelf:
        """The query's shelf. Raises AbsentError."""
        shelf = self.library.queries(question.query_set)
        if question.query is not None:
            shelf.example(question.query)
        return shelf

    def _key(self, kind: str, question: Question, *more: object) -> tuple:
        shelf = self.library.queries(question.query_set)
        return (kind, self.library.train.stamp, shelf.stamp, question, *more)

    def _embedded(self, question: Question) -> tuple[Prepared, list[Tensor]]:
        """(prepared query set, Q_c [k] of the question)."""
        prepared = self.prepared(question.query_set, question.recipe)
        if question.query is None:
            return prepared, [q.double().mean(0).to(q.dtype) for q in prepared.queries]
        return prepared, [q[question.query] for q in prepared.queries]

    def _scan(self, question: Question) -> np.ndarray:
        prepared, query = self._embedded(question)
        rows = self._resident()
        with self._scanning:
            if rows is None:
                alone = replace(prepared, queries=tuple(q[None] for q in query))
                return scorer.block(alone, 0, prepared.train.num_rows)[0].numpy()
            parts = zip(query, rows, prepared.row_weights, strict=True)
            found = sum(_product(x, q).mul_(r) for q, x, r in parts)
        assert isinstance(found, Tensor)
        found = found.float()
        if not torch.isfinite(found).all():
            raise RecipeError(
                "a score is not a finite number",
                where=f"training example {int((~torch.isfinite(found)).nonzero()[0])}",
                do="use a larger damping; if that does not help, run `tda verify`",
            )
        return found.numpy()

    @property
    def fits(self) -> bool:
        """Whether the float32 rows fit in the memory set aside for them."""
        return self.scan_bytes <= ROW_BYTES

    @property
    def scan_bytes(self) -> int:
        train = self.library.train.table
        return 4 * train.num_checkpoints * train.num_rows * train.dim

    def _resident(self) -> list[Tensor] | None:
        """The training rows of every checkpoint [n, k]; None where they do not fit."""
        if not self.fits:
            return None
        shelf = self.library.train

        def read() -> list[Tensor]:
            table = shelf.table
            table.require_complete()
            return [table.rows(c, 0, table.num_rows) for c in range(table.num_checkpoints)]

        return self._rows.get(("rows", shelf.stamp), read)

    # ---- answers

    def answer(self, question: Question, k: int, keep: Keep, search: Search = "auto") -> Answer:
        """The k strongest on either side. ``auto`` is exact where the rows fit in memory.

        An approximate search takes no filters: there it is exact.
        """
        self.require(question)
        start = time.perf_counter()
        kept = self.library.train.kept(keep)
        filtered = kept is not None or question.query is None
        if not filtered and search != "exact" and (search == "approximate" or not self.fits):
            best, worst, recall = self._approximate(question, k)
        else:
            best, worst = extremes(self.scores(question), k, kept)
            recall = None
        num_kept = self.library.train.num_rows if kept is None else len(kept)
        seconds = time.perf_counter() - start
        return Answer(_above(best, 1), _above(worst, -1), num_kept, seconds, recall)

    def _approximate(self, question: Question, k: int) -> tuple[Ranked, Ranked, float]:
        """Of a block of neighbouring queries at once: the next question is then answered already,
        and the recall is measured on more than one."""
        assert question.query is not None
        prepared, block = self._embedded(question)[0], question.query // SAMPLE
        shelf = self.library.train
        weights = ("index", shelf.stamp, hash(prepared.row_weights.numpy().tobytes()))

        def search() -> Any:
            with self._scanning:
                index = self._rows.get(weights, lambda: RowIndex.of(self._source, prepared))
                some = prepared.select(slice(block * SAMPLE, (block + 1) * SAMPLE))
                return index.top_k(some, k)

        first = replace(question, query=block * SAMPLE)
        top = self._held.get(self._key("approximate", first, k), search)
        place = question.query - block * SAMPLE
        sides = (top.proponents, top.opponents)
        best, worst = (Ranked(side.indices[place], side.scores[place]) for side in sides)
        return best, worst, float(top.recall)

    def self_influence(self, recipe: Recipe) -> np.ndarray:
        """Of every training example [train] float32."""
        key = ("self", self.library.train.stamp, recipe)
        return self._held.get(key, lambda: scorer.self_influence(self._source, recipe))

    def by_self_influence(self, recipe: Recipe, keep: Keep) -> np.ndarray:
        """Positions of the training examples that are kept, the highest self-influence first."""

        def order() -> np.ndarray:
            values, kept = self.self_influence(recipe), self.library.train.kept(keep)
            kept = np.arange(len(values)) if kept is None else kept
            return kept[np.argsort(-values[kept], kind="stable")]

        return self._held.get(("by self", self.library.train.stamp, recipe, keep), order)

    def reach(self, query_set: str, recipe: Recipe, index: int) -> np.ndarray:
        """Scores of one training example for every query of a set [query] float32."""
        self.library.train.example(index)
        prepared = self.prepared(query_set, recipe)
        total = torch.zeros(prepared.num_queries, dtype=torch.float64)
        for c, (q, weights) in enumerate(zip(prepared.queries, prepared.row_weights, strict=True)):
            row = prepared.train.gather(c, [index])[0].to(q.dtype)
            total += (q @ row).double() * float(weights[index])
        return total.float().numpy()

    # ---- whether a sign survives

    def sign_rule(self, recipe: Recipe) -> SignRule:
        return SignRule.of(self.store.manifest, recipe)

    def signs(self, question: Question, ranked: Ranked) -> list[bool] | None:
        """Which scores keep their sign (`tda.scorer.signs`); None where nothing repeats."""
        prepared, query = self._embedded(question)
        alone = replace(prepared, queries=tuple(q[None] for q in query))
        pairs = np.zeros(len(ranked.indices), np.int64)
        found = signs_survive(alone, self.sign_rule(question.recipe), pairs, ranked.indices)
        return None if found is None else found.tolist()

    # ---- layers

    @property
    def layers(self) -> tuple[tuple[str, slice], ...]:
        """The columns of each layer, if the store keeps layers apart."""
        found = self.store.manifest.get("layers") or ()
        return tuple((x["name"], slice(x["offset"], x["offset"] + x["size"])) for x in found)

    def by_layer(self, question: Question, indices: np.ndarray) -> np.ndarray:
        """How much each layer gives to the scores of some training examples [layer, len(indices)].

        The columns sum to the scores. Raises AbsentError where the rows do not keep layers apart.
        """
        if not self.layers:
            raise AbsentError(
                "the rows of this run do not keep layers apart",
                where=self.path,
                found=f"projection {self.store.manifest['projection']['kind']!r}",
                do=LAYERS_APART,
            )
        self.require(question)
        prepared, query = self._embedded(question)
        total = torch.zeros(len(self.layers), len(indices), dtype=torch.float64)
        for c, (q, weights) in enumerate(zip(query, prepared.row_weights, strict=True)):
            products = prepared.train.gather(c, indices).double() * q.double()
            products *= weights[indices].double()[:, None]
            total += torch.stack([products[:, columns].sum(1) for _, columns in self.layers])
        return total.float().numpy()


def extremes(scores: np.ndarray, k: int, kept: np.ndarray | None = None) -> tuple[Ranked, Ranked]:
    """(k highest, k lowest) of all scores or of those kept; ties to the smaller index."""
    some = torch.from_numpy(scores if kept is None else scores[kept])[None].contiguous()
    if some.shape[1] == 0:
        none = Ranked(np.empty(0, np.int64), np.empty(0, np.float32))
        return none, none
    best, worst = (Heaps(1, clipped(k, some.shape[1])) for _ in range(2))
    best.add(-some, 0)
    worst.add(some, 0)
    sides = []
    for heap, sign in ((best, -1), (worst, 1)):
        places, values = (part[0] for part in heap.finish())
        sides.append(Ranked(places if kept is None else kept[places], sign * values))
    return sides[0], sides[1]


def _above(ranked: Ranked, sign: int) -> Ranked:
    """Those whose score has this sign."""
    wanted = sign * ranked.scores > 0
    return Ranked(ranked.indices[wanted], ranked.scores[wanted])


def _product(rows: Tensor, query: Tensor) -> Tensor:
    """rows @ query [n], in the dtype of the query without a copy of all rows in it."""
    if query.dtype == rows.dtype:
        return rows @ query
    out = torch.empty(len(rows), dtype=query.dtype)
    step = max(1, TILE_BYTES // (8 * rows.shape[1]))
    for start in range(0, len(rows), step):
        torch.mv(rows[start : start + step].to(query.dtype), query, out=out[start : start + step])
    return out
