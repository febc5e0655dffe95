"""Curvatures are sums that merge; functions of them are those of the explicit matrix."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from memory_store import MemoryTable

from tda.curvature import Diagonal, Gram, WeightedRows, diagonal, gram, moments, row_ranges
from tda.errors import RecipeError
from tda.preconditioner import (
    Spectrum,
    decay,
    decompose,
    identity,
    inverse,
    nothing,
    require_curvature,
    require_invertible,
)


def sample(n: int, k: int) -> tuple[np.ndarray, np.ndarray]:
    """float32-valued rows [n, k] with an uneven spectrum, and weights [n]."""
    rng = np.random.default_rng(n * k)
    rows = (rng.normal(size=(n, k)) * np.exp(rng.normal(size=k))).astype(np.float32)
    return rows, rng.uniform(0, 1, n)


def vectors(m: int, k: int) -> np.ndarray:
    return np.random.default_rng(1).normal(size=(m, k))


def explicit(rows: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """H = (1/n) Σ h_i x_i x_iᵀ in float64."""
    rows = rows.astype(np.float64)
    return sum(h * np.outer(x, x) for h, x in zip(weights, rows, strict=True)) / len(rows)


def table(rows: np.ndarray, chunk_rows: int = 5) -> MemoryTable:
    return MemoryTable("train", rows[None], {}, chunk_rows)


def spectrum(rows: np.ndarray, weights: np.ndarray) -> Spectrum:
    return decompose(gram(table(rows), 0, torch.from_numpy(weights)))


@pytest.mark.parametrize("kind", [Gram, Diagonal])
def test_parts_merge_to_the_whole_in_any_order_and_zero_is_neutral(kind):
    rows, weights = sample(30, 6)
    X, h = torch.from_numpy(rows).double(), torch.from_numpy(weights)
    whole = kind.zero(6).add(X, h)
    parts = [kind.zero(6).add(X[s], h[s]) for s in (slice(20, 30), slice(0, 3), slice(3, 20))]
    merged = parts[0].merge(parts[1].merge(parts[2])).merge(kind.zero(6))
    torch.testing.assert_close(merged.mean(), whole.mean(), rtol=1e-12, atol=1e-14)
    expected = explicit(rows, weights)
    if kind is Diagonal:
        expected = np.diag(expected)
    np.testing.assert_allclose(whole.mean(), expected, rtol=1e-12, atol=1e-14)
    assert merged.count == 30


@pytest.mark.parametrize("chunk_rows", [1, 4, 40, 100])
def test_a_streamed_curvature_does_not_depend_on_the_chunks(chunk_rows):
    rows, weights = sample(40, 8)
    h = torch.from_numpy(weights)
    expected = explicit(rows, weights)
    full = gram(table(rows, chunk_rows), 0, h)
    np.testing.assert_allclose(full.mean(), expected, rtol=1e-12, atol=1e-14)
    axes = diagonal(table(rows, chunk_rows), 0, h)
    np.testing.assert_allclose(axes.mean(), np.diag(expected), rtol=1e-12)


@pytest.mark.parametrize("scale", [1.0, 1e-50])
def test_float32_products_are_summed_in_float64_at_any_scale_of_the_weights(scale, monkeypatch):
    monkeypatch.setattr(moments, "EXACT_FLOPS", 0)
    monkeypatch.setattr(moments, "TILE_BYTES", 1)
    rows, weights = sample(3000, 8)
    found = gram(table(rows, 50), 0, torch.from_numpy(weights * scale))
    expected = explicit(rows, weights) * scale
    assert found.eps == torch.finfo(torch.float32).eps
    assert np.abs(found.mean().numpy() - expected).max() < 1e-6 * np.abs(expected).max()


@pytest.mark.parametrize(("start", "stop"), [(0, 100), (3, 97), (10, 10), (99, 100)])
def test_row_ranges_cover_every_row_once_and_end_at_chunk_borders(start, stop, monkeypatch):
    monkeypatch.setattr(moments, "TILE_BYTES", 4 * 3 * 16)
    spans = list(row_ranges(table(np.zeros((100, 3), np.float32), 8), start, stop))
    assert [i for low, high in spans for i in range(low, high)] == list(range(start, stop))
    assert all(high % 16 == 0 or high == stop for _, high in spans)


@pytest.mark.parametrize("n", [5, 60], ids=["dual", "primal"])
@pytest.mark.parametrize("damping", [1e-3, 1.0, 1e3])
def test_functions_are_those_of_the_explicit_matrix(n, damping):
    rows, weights = sample(n, 20)
    x = vectors(4, 20)
    found = spectrum(rows, weights)
    X = torch.from_numpy(x)
    damped = explicit(rows, weights) + damping * np.eye(20)
    solved = np.linalg.solve(damped, x.T).T
    np.testing.assert_allclose(found.apply(inverse(damping), X), solved, rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(
        found.quadratic(inverse(damping), X), (x * solved).sum(1), rtol=1e-8, atol=1e-10
    )


def test_primal_and_dual_are_the_same_operator():
    rows, weights = sample(6, 15)
    X, h = torch.from_numpy(rows).double(), torch.from_numpy(weights)
    primal = decompose(Gram.zero(15).add(X, h))
    dual = decompose(WeightedRows(X * h.sqrt()[:, None]))
    assert isinstance(gram(table(rows), 0, h), WeightedRows)
    assert dual.vectors.shape == (15, 6)
    assert dual.trace == pytest.approx(primal.trace, rel=1e-12)
    torch.testing.assert_close(dual.vectors.T @ dual.vectors, torch.eye(6, dtype=torch.float64))
    x = torch.from_numpy(vectors(3, 15))
    for function in (identity, inverse(0.01), decay(1.0)):
        a, b = primal.apply(function, x), dual.apply(function, x)
        torch.testing.assert_close(a, b, rtol=1e-7, atol=1e-9)


def test_outside_the_span_of_the_rows_the_inverse_is_one_over_lambda():
    rows, weights = sample(4, 12)
    basis = np.linalg.qr(rows.astype(np.float64).T, mode="complete")[0]
    orthogonal = torch.from_numpy(basis[:, 4:].T)
    found = spectrum(rows, weights).apply(inverse(0.125), orthogonal)
    torch.testing.assert_close(found, 8 * orthogonal, rtol=1e-10, atol=1e-10)


def test_repeated_rows_leave_a_null_space_that_is_found():
    rows, weights = sample(4, 12)
    repeated = spectrum(np.repeat(rows, 2, axis=0), np.repeat(weights, 2))
    assert len(repeated.eigenvalues) == 4
    x = torch.from_numpy(vectors(3, 12))
    once = spectrum(rows, weights)
    torch.testing.assert_close(
        repeated.apply(inverse(0.1), x), once.apply(inverse(0.1), x), rtol=1e-9, atol=1e-9
    )


def test_a_diagonal_curvature_acts_on_each_coordinate_alone():
    rows, weights = sample(30, 6)
    found = decompose(diagonal(table(rows), 0, torch.from_numpy(weights)))
    x = vectors(3, 6)
    expected = x / (np.diag(explicit(rows, weights)) + 0.5)
    np.testing.assert_allclose(found.apply(inverse(0.5), torch.from_numpy(x)), expected, rtol=1e-12)
    np.testing.assert_allclose(
        found.quadratic(inverse(0.5), torch.from_numpy(x)), (x * expected).sum(1), rtol=1e-12
    )


def test_no_curvature_under_the_identity_changes_nothing():
    x = torch.from_numpy(vectors(3, 6))
    torch.testing.assert_close(nothing(6).apply(identity, x), x, rtol=0, atol=0)
    torch.testing.assert_close(nothing(6).quadratic(identity, x), x.square().sum(1))


def test_without_damping_the_inverse_is_exact_or_refused():
    rows, weights = sample(60, 8)
    found = spectrum(rows, weights)
    x = vectors(3, 8)
    exact = np.linalg.solve(explicit(rows, weights), x.T).T
    require_invertible(found, 0, "")
    undamped = inverse(0)
    np.testing.assert_allclose(found.apply(undamped, torch.from_numpy(x)), exact, rtol=1e-8)
    rows[:, 3] = rows[:, 2]
    for deficient in (spectrum(rows, weights), spectrum(rows[:5], weights[:5])):
        with pytest.raises(RecipeError, match=r"rank [57] of 8 dimensions") as error:
            require_invertible(deficient, 0, "recipe 'x', checkpoint 1")
        assert "checkpoint 1" in str(error.value)
        require_invertible(deficient, 1e-8, "")


def test_rank_is_judged_at_the_precision_of_the_products(monkeypatch):
    monkeypatch.setattr(moments, "EXACT_FLOPS", 0)
    rows, weights = sample(500, 8)
    assert spectrum(rows, weights).full_rank
    rows[:, 3] = rows[:, 2]
    assert not spectrum(rows, weights).full_rank


def test_a_zero_curvature_is_refused():
    rows, _ = sample(5, 8)
    with pytest.raises(RecipeError, match="curvature is zero"):
        require_curvature(spectrum(rows, np.zeros(5)).trace, "")


def test_a_spectrum_survives_being_stored_as_arrays():
    for moment in (gram, diagonal):
        rows, weights = sample(30, 6)
        found = decompose(moment(table(rows), 0, torch.from_numpy(weights)))
        back = Spectrum.from_arrays(found.arrays())
        x = torch.from_numpy(vectors(3, 6))
        torch.testing.assert_close(
            back.apply(inverse(0.1), x), found.apply(inverse(0.1), x), rtol=0, atol=0
        )
        assert (back.dim, back.count, back.resolution) == (6, 30, found.resolution)
