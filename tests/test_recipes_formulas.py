"""Every published recipe, and every field of a recipe, is its formula written out.

The rows are made, in float32, so both sides start from the same numbers; the oracle is `naive`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest
from memory_store import MemoryStore, exact_rows, make_store

from tda.recipe import Recipe
from tda.recipes import RECIPES
from tda.scorer import prepare, scores, self_influence, top_k

FORMS = {"primal": 12, "dual": 90}  # columns, of 40 rows
SPLITS = {
    12: (slice(0, 3), slice(3, 7), slice(7, 12)),
    90: (slice(0, 3), slice(3, 7), slice(7, 90)),
}
Formula = Callable[[MemoryStore], np.ndarray]


def both(store: MemoryStore) -> tuple[list[naive.Rows], list[naive.Rows]]:
    return exact_rows(store, "queries/q"), exact_rows(store)


def rates(store: MemoryStore) -> list[float]:
    return [c["learning_rate"] for c in store.manifest["checkpoints"]]


def split(store: MemoryStore) -> tuple[slice, ...]:
    return SPLITS[store.train.dim]


def variant(name: str, **changes: Any) -> Recipe:
    return replace(RECIPES[name], **changes)


def over_rows(formula: Callable, **options: Any) -> Formula:
    return lambda store: formula(*both(store), **options)


def by_layer(formula: Callable, **options: Any) -> Formula:
    return lambda store: formula(*both(store), split(store), **options)


def at_layer(rows: list[naive.Rows], layer: slice) -> list[naive.Rows]:
    return [r.project(np.eye(r.df.shape[1])[layer]) for r in rows]


def each_layer(formula: Callable, **options: Any) -> Formula:
    """The formula of each layer by itself, summed."""

    def total(store: MemoryStore) -> np.ndarray:
        q, t = both(store)
        return sum(formula(at_layer(q, x), at_layer(t, x), **options) for x in split(store))

    return total


def scaled(rows: list[naive.Rows], layers: tuple[slice, ...], alphas: tuple) -> list[naive.Rows]:
    alpha = np.concatenate(
        [np.full(x.stop - x.start, a) for x, a in zip(layers, alphas, strict=True)]
    )
    return [r.project(np.diag(alpha)) for r in rows]


def with_scaled_layers(formula: Callable, *alphas: float, sides: int = 1) -> Formula:
    """The formula with the layers of queries (and of training rows) multiplied, α in all."""

    def weighted(store: MemoryStore) -> np.ndarray:
        q, t = both(store)
        own = tuple(a ** (1 / sides) for a in alphas)
        return formula(
            scaled(q, split(store), own), scaled(t, split(store), own) if sides > 1 else t
        )

    return weighted


def preconditioned(store: MemoryStore, *alphas: float) -> np.ndarray:
    """mean_c (1/n) ⟨α ∘ (H+λI)⁻¹∇ℓ_q, ∇ℓ_i⟩."""
    q, t = both(store)
    alpha = np.concatenate(
        [np.full(x.stop - x.start, a) for x, a in zip(split(store), alphas, strict=True)]
    )
    found = []
    for a, b in zip(q, t, strict=True):
        solved = np.linalg.solve(naive.damped(naive.link_hessian(b), "auto", len(b.df)), a.dl.T)
        found.append((alpha[:, None] * solved).T @ b.dl.T / len(b.df))
    return np.mean(found, axis=0)


def diagonal(store: MemoryStore) -> np.ndarray:
    """λ is a tenth of the mean eigenvalue."""
    q, t = both(store)
    return naive.with_curvature(q, t, [np.diag(np.diag(naive.link_hessian(x))) for x in t], 0.1)


def gauss_newton(store: MemoryStore) -> np.ndarray:
    table = store.table("curvature")
    rows, weights = table.values.astype(np.float64), table.columns["curvature"].astype(np.float64)
    curvatures = [(h[:, None] * x).T @ x / len(x) for x, h in zip(rows, weights, strict=True)]
    return naive.with_curvature(*both(store), curvatures)


def shrunk(store: MemoryStore, share: float) -> np.ndarray:
    """mean_c (1/n) ∇f_qᵀ ((1−s)(H + tr(H)/n) + s·(diag(H) + .1·tr(H)/k))⁻¹ (−∇ℓ_i), by entries."""
    found = []
    for q, t in zip(*both(store), strict=True):
        H, k = naive.link_hessian(t), t.df.shape[1]
        damping = (1 - share) * np.trace(H) / len(t.df) + share * 0.1 * np.trace(H) / k
        for i, j in np.ndindex(H.shape):
            H[i, j] *= 1.0 if i == j else 1 - share
            H[i, j] += damping if i == j else 0.0
        solved = np.linalg.solve(H, -t.dl.T)
        found.append(q.margin @ solved / len(t.df))
    return np.mean(found, axis=0)


def shared(store: MemoryStore, share: float) -> np.ndarray:
    """Influence with the curvature of queries and training set mixed."""
    q, t = both(store)
    mixed = [
        share * naive.link_hessian(a) + (1 - share) * naive.link_hessian(b)
        for a, b in zip(q, t, strict=True)
    ]
    return naive.with_curvature(q, t, mixed)


def unrolled(*segments: list[int], wd: float = 0.0) -> Formula:
    """η = .1, .05, .1/3 for ten steps each: S = 1, 1.5, 1.833…"""

    def formula(store: MemoryStore) -> np.ndarray:
        sums = np.cumsum([10 * eta for eta in rates(store)])
        ends = [sums[segment[-1]] for segment in segments]
        return naive.source(*both(store), segments, np.diff([0, *ends]), wd)

    return formula


def tracin_unit(store: MemoryStore) -> np.ndarray:
    q, t = both(store)
    return naive.less(q, [rows.dl for rows in t], rates(store))


LAST = (("first", 0.0), ("middle", 0.0))
ALPHA = (("first", 0.5), ("last", 3.0))
CASES: dict[str, tuple[Recipe, Formula]] = {
    "d_trak": (RECIPES["d_trak"], over_rows(naive.d_trak)),
    "relatif": (RECIPES["relatif"], over_rows(naive.relatif, step=True)),
    "relatif_l": (RECIPES["relatif_l"], over_rows(naive.relatif, step=False)),
    "datainf": (RECIPES["datainf"], by_layer(naive.datainf)),
    "datainf λ auto": (
        variant("datainf", damping="auto"), by_layer(naive.datainf, damping="auto")
    ),
    "datainf whole": (
        variant("datainf", blocks="whole"),
        lambda s: naive.datainf(*both(s), [slice(0, s.train.dim)]),
    ),
    "arnoldi": (variant("arnoldi", rank=5), over_rows(naive.arnoldi, rank=5)),
    "trackstar": (variant("trackstar", metric="any"), by_layer(naive.trackstar)),
    "trackstar λ": (
        variant("trackstar", metric="any", damping=0.01, query_share=0.4),
        by_layer(naive.trackstar, damping=0.01, share=0.4),
    ),
    "less": (variant("less", metric="any"), tracin_unit),
    "influence_ekfac": (variant("influence_ekfac", basis="any", parameters="all"), diagonal),
    "influence_gn": (RECIPES["influence_gn"], gauss_newton),
    "shrunk": (
        variant("influence_shrunk", curvature_rows="link", basis="any"), lambda s: shrunk(s, 0.5)
    ),
    "query share": (variant("influence", query_share=0.25), lambda s: shared(s, 0.25)),
    "query share .75": (variant("influence", query_share=0.75), lambda s: shared(s, 0.75)),
    "source": (RECIPES["source"], unrolled([0], [1], [2])),
    "source 2": (variant("source", segments=2), unrolled([0, 1], [2])),
    "source 1": (variant("source", segments=1), unrolled([0, 1, 2])),
    "blocks": (variant("influence", blocks="layer"), each_layer(naive.influence)),
    "blocks λ": (
        variant("influence", blocks="layer", damping=0.1),
        each_layer(naive.influence, damping=0.1),
    ),
    "last layer": (
        variant("tracin", layer_weights=LAST),
        lambda s: naive.tracin(
            *(at_layer(rows, split(s)[-1]) for rows in both(s)), rates(s)
        ),
    ),
    "last layer cos": (
        variant("grad_cos", layer_weights=LAST),
        lambda s: naive.grad_cos(*(at_layer(rows, split(s)[-1]) for rows in both(s))),
    ),
    "α grad_dot": (
        variant("grad_dot", layer_weights=ALPHA), with_scaled_layers(naive.grad_dot, 0.5, 1, 3)
    ),
    "α grad_cos": (
        variant("grad_cos", layer_weights=ALPHA),
        with_scaled_layers(naive.grad_cos, 0.5, 1, 3, sides=2),
    ),
    "α influence": (
        variant("influence", layer_weights=ALPHA), lambda s: preconditioned(s, 0.5, 1, 3)
    ),
}  # fmt: skip


def stored(tmp_path: Any, case: str, form: str = "primal", has_margin: bool = True) -> MemoryStore:
    store = make_store(tmp_path, num_checkpoints=3, dim=FORMS[form], has_margin=has_margin)
    return store.with_curvature() if case == "influence_gn" else store


def matrix(store: MemoryStore, recipe: Recipe) -> np.ndarray:
    return scores(prepare(store, recipe, store.queries)).compute(scheduler="synchronous")


@pytest.mark.parametrize("has_margin", [True, False], ids=["margin", "no margin"])
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_scores_are_the_written_formula(case, form, has_margin, tmp_path):
    recipe, formula = CASES[case]
    store = stored(tmp_path, case, form, has_margin)
    assert naive.relative_error(matrix(store, recipe), formula(store)) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_scores_do_not_depend_on_the_chunks(case, tmp_path, monkeypatch):
    recipe, _ = CASES[case]
    store = stored(tmp_path, case)
    expected = matrix(store, recipe)
    monkeypatch.setattr("tda.curvature.moments.TILE_BYTES", 1)
    for chunk_rows in (1, 9, 1000):
        found = matrix(store.with_train(chunk_rows=chunk_rows), recipe)
        assert naive.relative_error(found, expected) < 1e-5


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("case", CASES)
def test_self_influence_is_the_diagonal_of_the_formula(case, form, tmp_path):
    """With the training set as query set, also where queries have a part in the curvature."""
    recipe, formula = CASES[case]
    store = stored(tmp_path, case, form)
    itself = replace(store, tables={**store.tables, "queries/q": store.train})
    found = self_influence(store, recipe)
    assert naive.relative_error(found, np.diag(formula(itself))) < 1e-5


@pytest.mark.parametrize("case", CASES)
def test_top_k_is_the_sorted_formula(case, tmp_path):
    recipe, formula = CASES[case]
    store = stored(tmp_path, case)
    wanted = formula(store)
    top = top_k(prepare(store, recipe, store.queries), 4)
    np.testing.assert_array_equal(top.proponents.indices, np.argsort(-wanted)[:, :4])
    np.testing.assert_array_equal(top.opponents.indices, np.argsort(wanted)[:, :4])


def test_what_is_kept_beside_a_store_is_that_of_this_recipe(tmp_path):
    """After every other recipe has asked, answers from the cache are those without one."""
    store = stored(tmp_path, "influence_gn").mark()
    for _ in range(2):
        for recipe, formula in CASES.values():
            assert naive.relative_error(matrix(store, recipe), formula(store)) < 1e-5
    itself = replace(store, tables={**store.tables, "queries/q": store.train})
    for _ in range(2):
        for recipe, formula in CASES.values():
            wanted = np.diag(formula(itself))
            assert naive.relative_error(self_influence(store, recipe), wanted) < 1e-5
