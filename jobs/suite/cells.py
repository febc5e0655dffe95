"""One cell of the leaderboard: a method, on the checkpoints of a task, in a process of its own.

    store    the training set featurized: what every recipe that asks it shares
    table    the Gauss–Newton rows of a store, for the recipes that ask for them
    recipe   scores from a store; or, for a recipe in parameter space, from `tda.attribute`
    replay   exact unrolling of the run of the attributed model
    peer     a script of jobs/peers in the peer's own environment

A cell leaves NAME.json (seconds, peak memory, bytes an example, or why it failed) and NAME.npz
(scores [query, train], float32) in the task's folder ``cells``.
"""

from __future__ import annotations

import json
import resource
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

import tda
from tda.curvature.table import ROWS_PER_DIMENSION
from tda.errors import TaskError
from tda.projection import Projection
from tda.recipe import Recipe
from tda.recipes import RECIPES
from tda.recipes.auto import AUTO, choose
from tda.store.encoding import Dtype, row_bytes
from tda.task import Task

DIM, SMALL_DIM = 4_096, 1_024  # 8 KB and 2 KB an example; a Gram's eigenvectors take dim³
LARGE_DIM = 16_384  # 32 KB, of which `influence_shrunk` decomposes its core alone
WIDE_DIM = 14_336  # 8 KB in int4
EACH_DIMS = {"count_sketch": 2_048, "eigenbasis": 1_024}  # of each of several checkpoints
ON_ONE_MODEL = ("grad_dot", "grad_cos", "influence", "trak", "influence_gn", "auto")
IN_EIGENBASIS = ("influence_ekfac", "influence_gn", "influence_shrunk")
ON_MODELS = (  # method, projection, what the query is
    ("trak", "count_sketch", "own"),
    ("influence_shrunk", "eigenbasis", "own"),
    ("influence_gn", "count_sketch", "margin"),
    ("influence_gn", "count_sketch", "own"),
)
ON_PATH = (
    ("tracin", "count_sketch", "own"),
    ("influence_shrunk", "eigenbasis", "own"),
    ("influence_gn", "count_sketch", "margin"),
    ("influence_gn", "count_sketch", "own"),
    ("source", "count_sketch", "own"),
)
NUM_MODELS, PATH_LENGTH = (5, 10), 6
FOUND = "found"
SMOOTHED: tuple[
    tuple[str, str | None, int, Dtype, int, str], ...
] = (  # method, projection, dim, type of a stored number, copies, noise
    ("influence_ekfac", None, 0, "bfloat16", 6, "0.2"),
    ("influence_ekfac", None, 0, "bfloat16", 6, FOUND),
    ("influence_shrunk", "eigenbasis", 1_024, "bfloat16", 6, "0.2"),  # 12 KB
    ("influence_shrunk", "eigenbasis", 1_024, "bfloat16", 6, FOUND),
    ("influence_shrunk", "eigenbasis", WIDE_DIM, "int4", 4, "0.2"),  # 32 KB
    ("influence_shrunk", "eigenbasis", WIDE_DIM, "int4", 4, FOUND),
    ("influence_ekfac", None, 0, "bfloat16", 24, FOUND),
)
INT4_DIMS = (1_024, 3_584, WIDE_DIM, 57_344)  # the last two: 8 and 32 KB
TERNARY_DIMS = (2_560, 8_960, 35_840, 143_360)  # in as many bytes
FEW_DIMS, MANY_DIMS = (256, 512, 1_024, 2_048), (256, 1_024, 4_096, 8_192, 16_384)
CURVES: tuple[
    tuple[str, str, Dtype, tuple[int, ...]], ...
] = (  # method, projection, type of a stored number, dimensions
    *(("influence", kind, "bfloat16", FEW_DIMS) for kind in ("count_sketch", "two_stage")),
    *(("influence", kind, "bfloat16", FEW_DIMS) for kind in ("kronecker", "eigenbasis")),
    ("influence_ekfac", "eigenbasis", "bfloat16", MANY_DIMS),
    ("influence_ekfac", "eigenbasis", "int8", MANY_DIMS),
    ("influence_ekfac", "eigenbasis", "int4", INT4_DIMS),
    ("influence_ekfac", "eigenbasis", "ternary", TERNARY_DIMS),
)
GRID = tuple(float(10.0**e) for e in np.arange(-4, 3.5, 0.5))


@dataclass(frozen=True, kw_only=True)
class Cell:
    """What is computed. checkpoints: "last", "path" or "models", the first ``number`` of them."""

    kind: str  # store | table | recipe | replay | peer
    method: str
    checkpoints: str = "last"
    number: int = 1
    copies: int = 1  # of each, with noise on the weights: `tda.smoothed`
    noise: str = "0.2"  # of copies; or found, by `tda.find_noise`
    projection: str | None = None
    dim: int = 0
    dtype: Dtype = "bfloat16"  # of a stored number
    metric: str = "euclidean"
    damping: str = "auto"
    query: str = "own"  # or what takes the place of the recipe's own: margin | loss
    blocks: str = "own"  # likewise: layer | whole
    layers: str = "own"  # likewise: learned, their weights
    measured: str = "loss"  # or output: what the task offers to D-TRAK
    num_queries: int | None = None
    peer: str | None = None
    part: str = "table"  # where it is shown: table | curve | grid

    @property
    def name(self) -> str:
        """Of its files."""
        parts = [self.peer or self.kind, self.method, self.checkpoints, str(self.number)]
        parts += [self.projection or "", str(self.dim or ""), self.metric, self.damping]
        parts += [part for part in (self.query, self.blocks, self.layers) if part != "own"]
        parts += [f"smoothed_{self.copies}"] if self.copies > 1 else []
        parts += [self.noise] if self.noise == FOUND else []
        parts += [self.measured] if self.measured != "loss" else []
        parts += [self.dtype] if self.dtype != "bfloat16" else []
        parts = [*parts, self.part] if self.part == "curve" else parts
        return "-".join("".join(c if c.isalnum() or c in "._" else "_" for c in p) for p in parts)

    @property
    def needs(self) -> list[Cell]:
        """The cells that must be there first: its store, and the store's Gauss–Newton rows."""
        if self.kind != "recipe" or self.projection is None:
            return []
        store = replace(
            self, kind="store", method="rows", part="store",
            damping="auto", query="own", blocks="own", layers="own",
        )  # fmt: skip
        has_table = self.method == AUTO or RECIPES[self.method].curvature_rows == "gauss_newton"
        return [store, replace(store, kind="table")] if has_table else [store]

    @property
    def needs_labels(self) -> bool:
        """Whether its curvature is of labels that the model gives."""
        recipe = RECIPES.get(self.method) if self.kind == "recipe" else None
        return recipe is not None and recipe.curvature_rows == "gauss_newton"

    def spec(self) -> dict[str, Any]:
        return asdict(self)


CURVE = Cell(kind="recipe", method="influence", part="curve")


def of_one_model(wide: bool) -> Iterator[Cell]:
    """What the table has of one model; wide: those that hold or decompose the largest matrices."""
    one = partial(Cell, kind="recipe")
    found = []
    for dim in (SMALL_DIM, DIM):
        found += [one(method=m, projection="eigenbasis", dim=dim) for m in IN_EIGENBASIS[::-1]]
    large = ("influence_ekfac", "influence_shrunk")
    found += [one(method=m, projection="eigenbasis", dim=LARGE_DIM) for m in large]
    found.append(one(method=AUTO, projection="eigenbasis", dim=DIM))
    found += [one(method=m, projection="count_sketch", dim=DIM) for m in ON_ONE_MODEL]
    found.append(one(method="influence_ekfac"))
    found.append(one(method="influence_ekfac", blocks="layer", damping="0.1"))
    found.append(one(method="influence_ekfac", damping="0.001"))
    learned = partial(one, projection="eigenbasis", dim=SMALL_DIM, layers="learned")
    found += [learned(method=m) for m in ("grad_dot", "influence_ekfac", "influence_shrunk")]
    by_layer = replace(learned(method="influence_gn"), blocks="layer")
    found += [by_layer, replace(by_layer, layers="own")]
    for cell in found:
        is_gram = cell.method == AUTO or RECIPES[cell.method].curvature == "gram"
        if ((is_gram and cell.dim == DIM) or cell.dim == LARGE_DIM) == wide:
            yield cell


def of_smoothed() -> Iterator[Cell]:
    """One model, and copies of it with noise on the weights."""
    for method, kind, dim, dtype, copies, noise in SMOOTHED:
        yield Cell(
            kind="recipe", method=method, copies=copies, noise=noise, projection=kind, dim=dim,
            dtype=dtype,
        )  # fmt: skip


def of_several(num_models: int) -> Iterator[Cell]:
    """What the table has of independent models and of one run's path."""
    counts = sorted({min(n, num_models) for n in NUM_MODELS} - {1})
    for number in counts:
        many = partial(Cell, kind="recipe", checkpoints="models", number=number)
        yield many(method="influence_ekfac")
        wide = many(method="influence_shrunk", projection="eigenbasis", dim=WIDE_DIM, dtype="int4")
        yield wide
        yield replace(wide, copies=2, noise=FOUND)
        rows = many(method="influence_gn", query="margin", projection="count_sketch")
        yield replace(rows, dim=EACH_DIMS["count_sketch"], dtype="int4", copies=4, noise=FOUND)
    on_models = [(ON_MODELS, "models", number) for number in counts]
    for chosen, which, number in (*on_models, (ON_PATH, "path", PATH_LENGTH)):
        for method, kind, query in chosen:
            yield Cell(
                kind="recipe", method=method, checkpoints=which, number=number,
                query=query, projection=kind, dim=EACH_DIMS[kind],
            )  # fmt: skip


def of_recipes() -> Iterator[Cell]:
    """Every recipe of the engine as it asks to be run: on one model, or on one run's path."""
    for name, recipe in RECIPES.items():
        about = _asked(recipe)
        if _follows_a_path(recipe):
            about |= {"checkpoints": "path", "number": PATH_LENGTH}
        yield Cell(kind="recipe", method=name, **about)


def of_curve() -> Iterator[Cell]:
    """LDS against bytes: one recipe in every projection, and EK-FAC in its own basis."""
    for method, kind, dtype, dims in CURVES:
        for dim in dims:
            one = replace(CURVE, method=method, projection=kind, dim=dim)
            yield replace(one, dtype=dtype)


def of_adam() -> Iterator[Cell]:
    """Of a model that Adam trained: recipes in the metric of its steps, where λ is implied too."""
    for method in ("influence_gn", "influence"):
        dim = EACH_DIMS["count_sketch"]
        yield Cell(kind="recipe", method=method, projection="count_sketch", dim=dim, metric="adam")


def of_output(num_models: int) -> Iterator[Cell]:
    """D-TRAK of a model whose output is no label: by its own output, and beside it by the loss."""
    number = min(NUM_MODELS[0], num_models)
    for measured in ("output", "loss"):
        for which, count in (("last", 1), ("models", number)):
            dim = EACH_DIMS["count_sketch"]
            yield Cell(
                kind="recipe", method="d_trak", checkpoints=which, number=count,
                projection="count_sketch", dim=dim, measured=measured,
            )  # fmt: skip


def of_grid() -> Iterator[Cell]:
    """The damping's whole path, to hold the automatic one against."""
    for name, recipe in RECIPES.items():
        about = _asked(recipe)
        if recipe.function != "inverse" or about["projection"] is None:
            continue
        for damping in GRID:
            yield Cell(kind="recipe", method=name, damping=f"{damping:.3g}", part="grid", **about)


def _asked(recipe: Any) -> dict[str, Any]:
    """Of the store that a recipe asks for."""
    if recipe.space == "parameters":
        return {"projection": None}
    kind = "eigenbasis" if recipe.basis == "eigen" else "count_sketch"
    metric = "euclidean" if recipe.metric == "any" else recipe.metric
    return {"projection": kind, "dim": DIM, "metric": metric}


def _follows_a_path(recipe: Any) -> bool:
    return recipe.checkpoint_weight == "learning_rate" or recipe.function == "unrolled"


def task_of(work: Any, cell: Cell, path: Path, quick: bool) -> Task:
    """The task with the cell's checkpoints."""
    whole = work.task(str(path), cell.checkpoints, quick)
    chosen = whole.checkpoints[: cell.number]
    made = partial(
        Task,
        whole.model,
        measurement=work.output if cell.measured == "output" else whole.measurement,
        metric=cell.metric,
    )
    if cell.copies == 1:
        return made(chosen)
    is_found = cell.noise == FOUND
    noise = tda.find_noise(made(chosen), work.test_set(quick)) if is_found else float(cell.noise)
    return made(tda.smoothed(chosen, cell.copies, noise))


def compute(work: Any, cell: Cell, path: Path, quick: bool) -> None:
    """Do what the cell says, and leave its two files."""
    torch.set_num_threads(1)
    started = time.perf_counter()
    train, queries = work.train_set(quick), work.test_set(quick)
    if cell.num_queries is not None:
        queries = {name: values[: cell.num_queries] for name, values in queries.items()}
    scores, extra = _WAYS[cell.kind](work, cell, path, quick, train, queries)
    result = {
        "cell": cell.spec(),
        "seconds": time.perf_counter() - started,
        "peak_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        **extra,
    }
    if scores is not None:
        (path / "cells").mkdir(exist_ok=True)
        np.savez(path / "cells" / f"{cell.name}.npz", scores=np.asarray(scores, np.float32))
    write(path, cell, result)


def write(path: Path, cell: Cell, result: dict[str, Any]) -> None:
    """NAME.json, whole or not at all: its presence says that the cell is finished."""
    file = path / "cells" / f"{cell.name}.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    partial = file.with_suffix(".part")
    partial.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    partial.replace(file)


def _index(work: Any, cell: Cell, path: Path, quick: bool, train: Any, queries: Any) -> Any:
    assert cell.projection is not None
    run = tda.index(
        task_of(work, cell, path, quick),
        train,
        path / "stores" / cell.name,
        projection=Projection(cell.projection, cell.dim),
        dtype=cell.dtype,
        progress=False,
    )
    run.add_queries(queries, "test")
    dim = run.store.manifest["projection"]["dim"]
    scale = 4 if cell.dtype == "int8" else 0
    return None, {
        "bytes_per_example": (row_bytes(dim, cell.dtype) + scale)
        * len(run.store.manifest["checkpoints"])
    }


def _table(work: Any, cell: Cell, path: Path, quick: bool, train: Any, queries: Any) -> Any:
    store = replace(cell, kind="store")
    run = tda.open(path / "stores" / store.name, task_of(work, cell, path, quick))
    enough = ROWS_PER_DIMENSION * DIM if cell.dim > DIM else None
    try:
        run.add_curvature(train, num_rows=enough)
    except TaskError as error:  # the recipes that ask for it will say so, others need not fail
        return None, {"none": str(error)}
    return None, {}


def _recipe(work: Any, cell: Cell, path: Path, quick: bool, train: Any, queries: Any) -> Any:
    if not cell.needs:
        task = task_of(work, cell, path, quick)
        recipe = recipe_of(cell)
        scores = tda.attribute(task, train, queries, recipe=recipe, progress=False)
        about = {"bytes_per_example": 0, "recipe": recipe.explain()}
        return scores, about | _noise([vars(one) for one in task.checkpoints])
    run = tda.open(path / "stores" / cell.needs[0].name)
    recipe = choose(run.store) if cell.method == AUTO else recipe_of(cell)
    about = {"chosen": recipe.name, "recipe": recipe.explain()}
    about |= _noise(run.store.manifest["checkpoints"])
    if cell.layers == "learned":
        recipe = run.learn_layer_weights("test", recipe)
    return run.scores("test", recipe=recipe).compute(), about


def _noise(checkpoints: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Of copies, on their weights."""
    noise = checkpoints[0].get("noise")
    return {"noise": noise} if noise else {}


def recipe_of(cell: Cell) -> Recipe:
    """The cell's recipe, with what the cell sets in place of its own."""
    given = {"query": cell.query, "blocks": cell.blocks, "damping": cell.damping}
    changed: dict[str, Any] = {k: v for k, v in given.items() if v not in ("own", "auto")}
    if "damping" in changed:
        changed["damping"] = float(cell.damping)
    return replace(RECIPES[cell.method], **changed)


def is_earlier(row: dict[str, Any]) -> bool:
    """Whether a row is of a recipe that has changed since."""
    cell = Cell(**row["cell"])
    if "recipe" not in row or cell.method == AUTO:
        return bool(row.get("recipe") == "earlier")
    return bool(row["recipe"] != recipe_of(cell).explain())


def damped(cell: Cell) -> str:
    """Of an automatic damping: "automatic", or "–" where the recipe has no curvature."""
    recipe = cell.kind == "recipe" and RECIPES.get(cell.method)
    return "–" if recipe and recipe.function == "identity" else "automatic"


def _replay(work: Any, cell: Cell, path: Path, quick: bool, train: Any, queries: Any) -> Any:
    course = work.course(quick)
    task = task_of(work, cell, path, quick)
    training = course.recorded(0, task.checkpoints[0].load())
    asked = (queries["input"], queries["target"])
    scores = training.influence(asked, task.measurement, progress=False)
    return scores, {"bytes_per_example": 0}


_WAYS = {"store": _index, "table": _table, "recipe": _recipe, "replay": _replay}
