"""What each training example is worth for a set of queries, and how sure that is.

    value[i] = Σ_{q in slice} score[q, i]           additive: slices add up to the whole

in the unit of the recipe's score; for `influence`, the predicted rise of the slice's total loss if
the example were left out. > 0: it helps. Trainings count alike: of unlike numbers of checkpoints,
a mean over all checkpoints is taken as the mean over trainings of their own means. The queries of a
slice are summed before the rows are read, so it costs one product with the training rows however
many queries there are.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch

from tda import scorer
from tda.errors import DataError, MismatchError
from tda.examples import Examples
from tda.recipe import Recipe
from tda.run import Run
from tda.scorer.replicates import num_parts, trainings
from tda.training.schedule import trained_to
from tda.valuation.frames import frame
from tda.valuation.metrics import for_metric, query_weights
from tda.valuation.significance import Significance, significance_of


@dataclass(frozen=True, eq=False)
class Values:
    """Values of training examples for slices of the queries.

    replicates: ``[replicate, slice, train]``, one value from each training (or checkpoint), whose
    mean is the value. parts: ``[part, slice, train]``, what parts of the projection contribute to
    it, or None. independent: whether the replicates are separate trainings. num_queries
    ``[slice]``: value/num_queries is the mean effect on a query.
    """

    ids: np.ndarray
    slices: tuple[str, ...]
    num_queries: np.ndarray
    replicates: np.ndarray
    parts: np.ndarray | None
    independent: bool
    recipe: str

    @cached_property
    def significance(self) -> Significance:
        """Of every value ``[slice, train]``; q is taken over all of them together."""
        return significance_of(self.replicates, self.parts, self.independent)

    @property
    def value(self) -> np.ndarray:
        """``[slice, train]``"""
        return self.significance.value

    @property
    def reliable(self) -> np.ndarray:
        """``[slice, train]``: the sign survives a false discovery rate of 5 %."""
        return self.significance.reliable

    @property
    def covers(self) -> str:
        """What the intervals cover, and what they do not."""
        count = len(self.replicates)
        if count < 2:
            return "nothing: there is one replicate"
        if self.independent:
            text = f"the change from training to training ({count} of them): seed, order, start"
        else:
            text = (
                f"the change over {count} checkpoints of one training, which is a lower bound: "
                "they depend on each other, so there is no p, and another seed can differ by more"
            )
        if self.parts is not None:
            text += "; the error of the random projection"
        return text + "; not other queries, nor what the recipe's first-order formula leaves out"

    @property
    def verdict(self) -> str:
        """One sentence for a reader who wants to act on the signs."""
        if len(self.replicates) < 2 or not self.independent:
            return (
                "not enough replicates: one training tells no sign's reliability; index "
                "checkpoints of several seeds, or give several runs"
            )
        number, total = int(self.reliable.sum()), self.reliable.size
        return f"{number} of {total} values keep their sign at a false discovery rate of 5 %"

    def to_frame(self) -> Any:
        """One row a slice and training example (pandas)."""
        found, (num_slices, num_train) = self.significance, self.value.shape
        return frame(
            {
                "slice": np.repeat(np.array(self.slices), num_train),
                "id": np.tile(self.ids, num_slices),
                "value": found.value.ravel(),
                "standard_error": found.standard_error.ravel(),
                "ci_lo": found.low.ravel(),
                "ci_hi": found.high.ravel(),
                "p": found.p.ravel(),
                "q": found.q.ravel(),
                "reliable": found.reliable.ravel(),
            }
        )


def values(
    runs: Run | Sequence[Run],
    queries: Any,
    recipe: str | Recipe = "influence",
    by: str | slice | Sequence[Any] | np.ndarray | None = None,
    metric: str | None = None,
) -> Values:
    """Values of every training example for a query set, or for slices of it.

    runs: a run, or runs of independent trainings on the same data, each of which is a replicate;
    one whose trainings are all in those before it is none, and is left out.
    queries: the name of a stored query set, or a data set. by: None for all queries together, a
    column of the query set ("label", "source", "group"), a slice for some of the queries alone, or
    one name a query ``[query]``. metric: "loss", "margin" or "accuracy" (`tda.valuation.metrics`)
    in place of what the recipe is about.

    In a single run, checkpoints whose steps do not increase begin another training, and trainings
    are the replicates. With one training its checkpoints are, unless the recipe sums along the
    training (weights by learning rate): its terms are not repetitions of one another.

    For a sketched run and a recipe without curvature, parts of the projection measure its error
    (for the count sketch on the wide side: its parts also share out the parameters).
    Raises MismatchError where runs hold other training examples, or under the name other queries or
    slices of them, DataError for names that do not match the queries.
    """
    given = [runs] if isinstance(runs, Run) else list(runs)
    if not given or any(not np.array_equal(run.ids, given[0].ids) for run in given):
        raise MismatchError(
            "these runs are not of the same training examples",
            found=", ".join(f"{run.path}: {len(run.ids)}" for run in given) or "no run",
            wanted="runs of one training set, in one order",
        )
    measurement = given[0].store.manifest.get("measurement", {"name": "loss"})
    chosen = for_metric(given[0].recipe(recipe), metric, measurement)
    asked = [_asked(run, queries, by) for run in given]
    _require_same(given, asked)
    pairs, known = [], frozenset[Any]()
    for run, one in zip(given, asked, strict=True):
        if not (own := trained_to(run.store.manifest["checkpoints"])) <= known:
            pairs.append((run, one))
            known |= own
    found = [_one_run(run, one, chosen, metric) for run, one in pairs]
    if len(found) == 1:
        return found[0]
    first, seeds = found[0], {run.store.manifest["projection"].get("seed") for run, _ in pairs}
    parts = [one.parts for one in found if one.parts is not None]
    shared = len(seeds) == 1 and len(parts) == len(found)
    return Values(
        ids=first.ids,
        slices=first.slices,
        num_queries=first.num_queries,
        replicates=np.stack([one.value for one in found]),
        parts=np.mean(parts, axis=0) if shared else None,
        independent=True,
        recipe=first.recipe,
    )


@dataclass(frozen=True, eq=False)
class _Asked:
    """A query set of one run; member: indicator ``[slice, query]`` of its slices."""

    name: str
    table: Any
    slices: tuple[str, ...]
    member: np.ndarray

    @cached_property
    def digest(self) -> str:
        return Examples(self.table.column("id"), self.table.column("digest")).digest()

    @property
    def slice_of(self) -> np.ndarray:
        """The name of every query's slice ``[query]``."""
        return np.array(self.slices)[self.member.argmax(0)]


def _asked(run: Run, queries: Any, by: Any) -> _Asked:
    name = queries if isinstance(queries, str) else run.add_queries(queries)
    table = run.store.table(f"queries/{name}")
    return _Asked(name, table, *_slices(table, by))


def _require_same(runs: Sequence[Run], asked: Sequence[_Asked]) -> None:
    """Raises MismatchError unless every run holds the queries and the slices of the first."""
    first = asked[0]
    for run, other in zip(runs[1:], asked[1:], strict=True):
        places = f"{runs[0].path}, {run.path}"
        if other.digest != first.digest:
            raise MismatchError(
                f"query set {first.name!r} is not the same in these runs",
                where=places,
                found=f"{other.table.num_rows} queries, {other.digest}",
                wanted=f"{first.table.num_rows} queries, {first.digest}",
                do="give the queries themselves in place of the name, or store them in every run",
            )
        differs = other.slice_of != first.slice_of
        if differs.any():
            index = int(np.argmax(differs))
            raise MismatchError(
                f"query set {first.name!r} is not sliced alike in these runs",
                where=places,
                found=f"query {index} in slice {str(other.slice_of[index])!r}",
                wanted=f"in slice {str(first.slice_of[index])!r}",
                do="give one name a query as `by`",
            )


def _one_run(run: Run, asked: _Asked, recipe: Recipe, metric: str | None) -> Values:
    table, slices, member = asked.table, asked.slices, asked.member
    prepared = scorer.prepare(run.store, recipe, table)
    weights = _balance(run, recipe)
    if (of_metric := query_weights(table, recipe, metric)) is not None:
        weights = weights * of_metric
    terms, parts = _terms(prepared, member, num_parts(run.store.manifest, recipe), weights)
    groups, independent = trainings(run.store.manifest["checkpoints"], recipe)
    # Each training is a replicate of the whole: the mean of replicates is the sum of all terms.
    replicates = np.stack([len(groups) * terms[group].sum(0) for group in groups])
    counts = member.sum(1).astype(np.int64)
    return Values(run.ids, slices, counts, replicates, parts, independent, recipe.name)


def _slices(table: Any, by: Any) -> tuple[tuple[str, ...], np.ndarray]:
    """(names, indicator ``[slice, query]`` float64) of the slices of a query set."""
    num_queries = table.num_rows
    if by is None:
        return ("all",), np.ones((1, num_queries))
    if isinstance(by, slice):
        member = np.zeros((1, num_queries))
        member[0, by] = 1
        names = np.array([f"{by.start or 0}:{num_queries if by.stop is None else by.stop}"])
    else:
        column = table.column(by) if isinstance(by, str) else np.asarray(by)
        if column.shape != (num_queries,):
            raise DataError(
                "queries cannot be sliced by this",
                where=f"query set {table.name!r}",
                found=f"shape {list(column.shape)}",
                wanted=f"one name a query [{num_queries}]",
            )
        names, inverse = np.unique(column, return_inverse=True)
        member = (inverse == np.arange(len(names))[:, None]).astype(np.float64)
    if not member.sum(1).all():
        raise DataError("a slice holds no query", where=f"query set {table.name!r}", found=by)
    return tuple(str(name) for name in names), member


def _balance(run: Run, recipe: Recipe) -> np.ndarray:
    """C/(G·C_g) ``[C, 1]`` of the C_g checkpoints of each of G trainings: w_c = 1/(G·C_g).

    1 where the recipe is no mean over checkpoints.
    """
    groups, _ = trainings(run.store.manifest["checkpoints"], recipe)
    count = sum(map(len, groups))
    factors = np.ones((count, 1))
    if recipe.checkpoint_weight == "mean" and recipe.function != "unrolled":
        for group in groups:
            factors[group] = count / (len(groups) * len(group))
    return factors


def _terms(
    prepared: scorer.Prepared, member: np.ndarray, num_parts: int, weights: np.ndarray
) -> tuple[np.ndarray, np.ndarray | None]:
    """What each checkpoint ``[C, slice, train]`` and each part of the projection contributes.

    Part b holds the dimensions b, b + B, b + 2B, … weights: of the queries ``[C, query or 1]``.
    """
    summed = [
        torch.from_numpy(member * w) @ q.double()
        for w, q in zip(weights, prepared.queries, strict=True)
    ]
    cut = [_cut(q, num_parts) for q in summed]
    shape = (len(member), prepared.train.num_rows)
    terms, parts = np.zeros((len(summed), *shape)), np.zeros((num_parts, *shape))
    for low, high, rows in scorer.stream(prepared.train, 0, shape[1]):
        for c, (q, x) in enumerate(zip(cut, rows, strict=True)):
            weighted = x.double() * prepared.row_weights[c, low:high, None]
            product = (q @ _cut(weighted, num_parts).mT).numpy()  # [part, slice, row]
            terms[c, :, low:high] = product.sum(0)
            parts[:, :, low:high] += product
    return terms, parts if num_parts > 1 else None


def _cut(rows: torch.Tensor, num_parts: int) -> torch.Tensor:
    """``[row, dim]`` to ``[part, row, dim/part]``, filled up with zeros."""
    short = -rows.shape[1] % num_parts
    filled = torch.nn.functional.pad(rows, (0, short)) if short else rows
    return filled.reshape(len(rows), -1, num_parts).permute(2, 0, 1)


def projection_parts(
    run: Run, queries: str, recipe: Recipe, examples: np.ndarray
) -> np.ndarray | None:
    """What parts of the projection contribute to the values of some examples ``[part, example]``.

    None where the projection has no exchangeable parts (see `values`).
    """
    pieces = num_parts(run.store.manifest, recipe)
    if pieces == 1:
        return None
    prepared = scorer.prepare(run.store, recipe, run.store.table(f"queries/{queries}"))
    parts = np.zeros((pieces, len(examples)))
    balance = _balance(run, recipe)[:, 0]
    for c, (q, r) in enumerate(zip(prepared.queries, prepared.row_weights, strict=True)):
        rows = prepared.train.gather(c, examples).double() * r[examples, None]
        summed = balance[c] * q.double().sum(0)[None]
        parts += (_cut(summed, pieces) @ _cut(rows, pieces).mT)[:, 0].numpy()
    return parts
