"""A run: index once, then ask with any recipe.

run = tda.index(task, train, "stores/my_run")        featurize, or finish featurizing
run.top_k(queries)    run.scores(queries)    run.self_influence()
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from tda import scorer
from tda.baselines import embedding_top_k
from tda.bases import read_bases
from tda.batch_size import BatchSize
from tda.curvature.table import curvature_filler, plan_curvature
from tda.data import Dataset, as_dataset
from tda.errors import MismatchError, StoreError, TaskError
from tda.examples import Examples, describe
from tda.featurizer import Featurizer
from tda.filling import Filling, filler
from tda.layout import is_sharded
from tda.progress import progress_bar
from tda.projection import Projection
from tda.recipe import Recipe
from tda.recipes.auto import recipe_for
from tda.scorer import Prepared, TopK
from tda.scorer.layer_weights import learn_layer_weights
from tda.store import Store, Table
from tda.store.files import Place
from tda.store.lock import sole_writer
from tda.task import Task, require_task

if TYPE_CHECKING:
    import dask.array as da

    from tda.store import Fault


def open(path: str | Place, task: Task | None = None) -> Run:
    """The run at ``path``. The task is only needed to featurize new queries.

    Raises StoreError where there is no run, MismatchError where it was made by another task.
    """
    store = Store.open(path)
    if task is not None:
        require_task(task, "tda.open(path, tda.Task(model, checkpoints=[…]))")
        others = {n: part for n, part in store.manifest.items() if n not in ("metric", "bases")}
        Store.create(path, {**others, **task.manifest()})
    return Run(store, task)


class Run:
    """A store, and what can be asked of it. Made by `tda.index` and `tda.open`.

    Where a method takes ``queries``, it is a data set (featurized and stored the first time, which
    needs the task) or the name of a stored query set; ``recipe`` is a name of `tda.RECIPES` or a
    `Recipe`. `scores` and `top_k` also take what `prepare` gave, whose recipe is its own: several
    answers, prepared once.
    """

    def __init__(self, store: Store, task: Task | None = None) -> None:
        self.store = store
        self.task = task
        self._featurizer: Featurizer | None = None

    def __reduce__(self) -> tuple:
        if self.task is not None and is_sharded(self.task.model):
            raise TaskError(
                "a model that is sharded does not leave the processes it lies on",
                do="leave `workers` and clusters out: these processes share its passes as it is",
            )
        return Run, (self.store, self.task)  # a worker makes its own featurizer

    def __repr__(self) -> str:
        return f"Run({str(self.store.path)!r})"

    @property
    def path(self) -> Place:
        return self.store.path

    @property
    def queries(self) -> list[str]:
        """Names of the stored query sets."""
        return self.store.queries()

    @property
    def ids(self) -> np.ndarray:
        """``[train]`` ids of the training examples, in the order of every score."""
        return self.store.table("train").column("id")

    def delete(self, ids: Sequence[str]) -> int:
        """Leave training examples out of every answer, at once; returns how many this changed.

        As if they had never been indexed: out of scores, rankings, curvature, means over examples.
        No row is computed or removed; `restore` takes it back, `compact` makes it final. Positions
        are always those in ``run.ids``. Raises DataError for an unknown id, or if none were left.
        """
        with sole_writer(self.path):
            return self.store.delete(ids)

    def restore(self, ids: Sequence[str]) -> int:
        """Let deleted examples count again; returns how many this changed. Raises DataError."""
        with sole_writer(self.path):
            return self.store.restore(ids)

    @property
    def deleted(self) -> np.ndarray:
        """``[d]`` ids of the training examples that are deleted."""
        return self.store.deleted

    def add_queries(
        self,
        dataset: Any,
        name: str | None = None,
        *,
        batch_size: BatchSize = "auto",
        progress: bool = False,
    ) -> str:
        """Featurize and store a query set; returns its name (by default made of its content)."""
        data = as_dataset(dataset)
        with progress_bar("reading the queries", len(data), progress) as tick:
            examples = describe(data, tick)
        name = name or f"q-{examples.digest()[:16]}"
        with sole_writer(self.path):
            table = self._plan(f"queries/{name}", examples, data)
            work = Filling(self, table.name, filler, data, batch_size)
            work.finish(f"queries {name}", progress)
        return name

    def add_curvature(
        self,
        dataset: Any,
        *,
        num_rows: int | None = None,
        batch_size: BatchSize = "auto",
        progress: bool = False,
    ) -> None:
        """Featurize and store rows of which the Gauss–Newton matrix is made, for "influence_gn".

        dataset: the training set. num_rows: pairs (example, label) drawn from it, by default four
        a dimension of the projection; see ``tda.curvature.table``. The same call resumes, computes
        what checkpoints have been added, and begins anew where the training set has grown.
        Of a model with one output the training rows are all it takes: nothing is added.
        Raises TaskError where the measurement has no such matrix, MismatchError if these are not
        the training examples.
        """
        data, featurizer = as_dataset(dataset), self.featurizer()
        if featurizer.task.measurement.scalar:
            return
        total = len(data) * self.store.table("train").num_checkpoints
        with sole_writer(self.path):
            with progress_bar("choosing curvature rows", total, progress) as tick:
                table = plan_curvature(self.store, featurizer, data, num_rows, batch_size, tick)
            work = Filling(self, table.name, curvature_filler, data, batch_size)
            work.finish("curvature", progress)

    def verify(self, *, withdraw: bool = True) -> list[Fault]:
        """Read everything the run holds; see `tda.upkeep.verify`."""
        from tda.upkeep import verify

        return verify(self.path, withdraw=withdraw)

    def scores(self, queries: Any, recipe: str | Recipe = "trak") -> da.Array:
        """Every score, ``[query, train]`` float32; > 0 where training on the example helps.

        A Dask array: computed block by block when asked (``.compute()``, ``.to_zarr(path)``).
        """
        return scorer.scores(self.prepare(queries, recipe))

    def top_k(
        self,
        queries: Any,
        k: int = 10,
        recipe: str | Recipe = "influence",
        *,
        approximate: bool = False,
    ) -> TopK:
        """The k most positive and k most negative training examples of each query.

        Exact by default. ``approximate``: FAISS proposes candidates, whose scores are then exact;
        the measured recall comes with the answer.
        """
        from tda.scorer import candidates  # FAISS takes a moment

        prepared = self.prepare(queries, recipe)
        if approximate:
            return candidates.approximate_top_k(self.store, prepared, k)
        return scorer.top_k(prepared, k)

    def self_influence(self, recipe: str | Recipe = "influence") -> np.ndarray:
        """``[train]`` float32: the score of each training example for itself.

        Large where the model had to learn the example by heart: outliers and wrong labels.
        """
        return scorer.self_influence(self.store, self.recipe(recipe))

    def baseline_top_k(self, queries: Any, k: int = 10, only: Sequence[int] | None = None) -> TopK:
        """What needs no gradient: nearest and farthest examples by cosine of the last hidden layer.

        only: some of the queries, by index. Raises StoreError where the run holds no embeddings.
        """
        name = self._name(queries)
        return embedding_top_k(self.store, self.store.table(f"queries/{name}"), k, only)

    def prepare(self, queries: Any, recipe: str | Recipe = "influence") -> Prepared:
        """The queries with the whole method folded in: what `tda.scorer` works on."""
        if isinstance(queries, scorer.Prepared):
            return queries
        chosen, name = self.recipe(recipe), self._name(queries)
        return scorer.prepare(self.store, chosen, self.store.table(f"queries/{name}"))

    def learn_layer_weights(self, queries: Any, recipe: str | Recipe) -> Recipe:
        """The recipe with weights of layers under which the queries' best examples stand out most.

        Needs rows that keep layers apart; see `tda.scorer.layer_weights`.
        """
        chosen, name = self.recipe(recipe), self._name(queries)
        return learn_layer_weights(self.store, chosen, self.store.table(f"queries/{name}"))

    def recipe(self, recipe: str | Recipe) -> Recipe:
        """The recipe of that name; "auto": what suits this run best, its ``summary`` says why."""
        return recipe_for(self.store, recipe)

    def _name(self, queries: Any) -> str:
        if not isinstance(queries, str):
            self.store.table("train").require_complete()  # before queries are computed
            return self.add_queries(queries)
        if queries not in self.queries:
            raise StoreError(
                f"there is no stored query set {queries!r}",
                where=self.path,
                wanted=", ".join(self.queries) or "none is stored yet",
                do="store it with run.add_queries(dataset, name) or `tda index`",
            )
        return queries

    def featurizer(self) -> Featurizer:
        """The featurizer of this run's task, with this run's projection."""
        if self.task is None:
            raise TaskError(
                "featurizing needs the task",
                where=self.path,
                do="open the run with tda.open(path, task=task), or name a stored query set: "
                + (", ".join(self.queries) or "none yet"),
            )
        if self._featurizer is None or self._featurizer.projector is None:
            projection = Projection.stored(self.store.manifest["projection"])
            bases = None
            if projection.needs_pilot:
                bases = list(read_bases(self.path, self.store.manifest, self.task))
            self._featurizer = Featurizer(self.task)
            self._featurizer.bind(projection, bases)
        return self._featurizer

    def _plan(self, name: str, examples: Examples, data: Dataset) -> Table:
        """The table of a data set, created if need be, with as many hidden units as the model."""
        try:
            train = self.store.table("train")
        except StoreError:  # nothing is planned yet
            train = None
        hidden = self.featurizer().probe(data).hidden if train is None else train.hidden
        table = self.store.plan(name, examples, hidden)
        if self.task is not None and len(self.task.checkpoints) != table.num_checkpoints:
            raise MismatchError(
                "the run has other checkpoints than the task it was opened with",
                where=self.path,
                found=f"{len(self.task.checkpoints)} checkpoints in the task",
                wanted=f"{table.num_checkpoints}, as many as the run has by now",
                do="open it anew: tda.open(path, task=task) with the task it was indexed with last",
            )
        return table
