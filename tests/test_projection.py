"""A sketch is one linear map, however it is computed; E[PᵀP] = I."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from scipy.optimize import brentq
from torch import Tensor

import tda
from tda.errors import ConfigError
from tda.gradients import Dense, Factor, Lookup, Outer
from tda.gradients.factors import gram_square_norm, materialise
from tda.projection import Pilot, Projection, _ring, kronecker
from tda.projection import tiles as tiling
from tda.projection.kronecker import _leading
from tda.projection.sketches import CountSketch

SHAPES = [(30, 40), (100, 70), (30, 200), (7, 5)]  # sides below and above DIM
DIM = 64
by_form = pytest.mark.parametrize("form", ["runs", "outer", "rings"])


def count_sketch(form: str, seed: int, shape: tuple[int, int], **more: Any) -> CountSketch:
    if form == "runs":
        return CountSketch(DIM, seed, {"w": shape}, **more)
    ring = _ring(DIM, min(shape)) if form == "rings" else None
    return CountSketch(DIM, seed, {"w": shape}, ["w"], ring=ring, **more)


def outer(rows: int, columns: int, positions: int = 1, examples: int = 6) -> Outer:
    left = torch.randn(examples, positions, 1, rows)
    return Outer(left, torch.randn(examples, positions, 1, columns))


def sketched(sketch: CountSketch, factor: Factor) -> Tensor:
    buffer = sketch.zeros(factor.num_examples)
    sketch.add(buffer, "w", [factor])
    return sketch.rows(buffer)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("dim", [DIM, 63])
@pytest.mark.parametrize("on_rings", [False, True])
def test_the_sketch_of_an_outer_product_is_that_of_its_matrix(shape, dim, on_rings):
    """By Fourier transforms of the two sides, and coordinate by coordinate."""
    factor = outer(*shape)
    ring = _ring(dim, min(shape)) if on_rings else None
    sketch = CountSketch(dim, 3, {"w": shape}, ["w"], ring=ring)
    fast = sketched(sketch, factor)
    slow = sketched(sketch, Dense(factor.rows(0, shape[0])))
    torch.testing.assert_close(fast, slow, rtol=1e-4, atol=1e-4 * float(slow.abs().max()))


@by_form
@pytest.mark.parametrize("shape", SHAPES)
def test_each_coordinate_goes_to_one_bucket_with_one_sign(shape, form):
    """The columns of P, one unit gradient at a time: entries in {0, ±1}, one not 0."""
    num = shape[0] * shape[1]
    sketch = count_sketch(form, 1, shape)
    columns = sketched(sketch, Dense(torch.eye(num).reshape(num, *shape)))
    assert torch.equal(columns.abs().sum(1), torch.ones(num))
    assert torch.equal(columns.abs().max(1).values, torch.ones(num))


@by_form
def test_products_are_unbiased_with_the_variance_of_a_sketch(form):
    factor, seeds = outer(30, 40), 300
    gradients = factor.rows(0, 30).flatten(1)
    exact = gradients @ gradients.T
    norms = gradients.norm(dim=1)
    errors = torch.stack(
        [
            (rows @ rows.T - exact) / (norms[:, None] * norms)
            for seed in range(seeds)
            for rows in [sketched(count_sketch(form, seed, (30, 40)), factor)]
        ]
    )
    apart = ~torch.eye(len(exact), dtype=torch.bool)
    assert float(errors.mean(0).abs().max()) < 4.5 * (2 / DIM / seeds) ** 0.5
    assert 0.5 < float(DIM * errors.var(0)[apart].mean()) < 1.5
    assert float(DIM * errors.var(0).max()) < 5


@pytest.mark.parametrize("size", [1, 50, 999, 2**20])
def test_tiles_do_not_matter(monkeypatch, size):
    factor = outer(30, 200, positions=5)
    sketch = CountSketch(DIM, 0, {"w": (30, 200)})
    whole = sketched(sketch, factor)
    monkeypatch.setattr(tiling, "_TILE_FLOATS", size)
    torch.testing.assert_close(sketched(sketch, factor), whole, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("size", [2**20, 2000, 90])
@pytest.mark.parametrize("dim", [DIM, 63])
def test_runs_rolled_at_once_are_runs_added_one_by_one(monkeypatch, dim, size):
    """What a GPU computes, computed here: the same sketch from any tile."""
    factor = outer(30, 200, positions=5)
    sketch = CountSketch(dim, 4, {"w": (30, 200)})
    wanted = sketched(sketch, factor)
    monkeypatch.setattr(tiling, "_TILE_FLOATS", size)
    monkeypatch.setattr(CountSketch, "add_tile", CountSketch.add_rolled)
    torch.testing.assert_close(sketched(sketch, factor), wanted, rtol=1e-4, atol=1e-4)


def test_a_lookup_is_its_dense_gradient():
    index = torch.randint(0, 50, (4, 7))
    lookup = Lookup(index, torch.randn(4, 7, 9), 50)
    sketch = CountSketch(DIM, 0, {"w": (50, 9)})
    dense = sketched(sketch, Dense(lookup.rows(0, 50)))
    torch.testing.assert_close(sketched(sketch, lookup), dense, rtol=1e-4, atol=1e-4)
    assert lookup.square_norm() is not None
    torch.testing.assert_close(lookup.square_norm(), lookup.rows(0, 50).square().sum((1, 2)))


def test_only_large_layers_with_one_position_are_sketched_as_outer_products(tmp_path):
    """Found by looking at a few examples, and kept in the manifest for those who come later."""
    model = torch.nn.Sequential(
        torch.nn.Linear(40, 8), torch.nn.ReLU(), torch.nn.Linear(8, 3), torch.nn.Flatten()
    )
    data = (torch.randn(20, 40), torch.arange(20) % 3)
    task = tda.Task(model)
    run = tda.index(task, data, tmp_path / "run", proj_dim=32, progress=False)
    assert run.store.manifest["projection"]["rank_one"] == ["0.weight"]
    assert run.store.manifest["projection"]["ring"] == 8
    before = run.store.table("train").rows(0, 0, 20)
    again = tda.index(task, data, tmp_path / "run", proj_dim=32, progress=False)
    name = tda.open(tmp_path / "run", task=task).add_queries(data, "same")
    queries = again.store.table(f"queries/{name}").rows(0, 0, 20)
    torch.testing.assert_close(queries, before, rtol=2**-7, atol=1e-6)  # train rows are bfloat16


@pytest.mark.parametrize("ring", [24, 4, 2 * DIM])
def test_rings_divide_the_row_and_hold_the_shorter_side(ring):
    projection = Projection("count_sketch", DIM, rank_one=["w"], ring=ring)
    with pytest.raises(ConfigError, match="another model") as caught:
        projection.bind({"w": (8, 500)})
    assert caught.value.found == f"rings of {ring} of {DIM} for (8, 500)"


def test_one_ring_holds_the_shorter_sides_of_all():
    shapes = {"a": (10, 500), "b": (500, 17), "c": (3, 3)}
    assert Projection("count_sketch", DIM).resolve(shapes, ["a", "b", "c"], {}).ring == 32
    assert Projection("count_sketch", DIM).resolve(shapes, ["c"], {}).ring is None
    wide = {"a": (10, 500), "b": (500, 65)}
    assert Projection("count_sketch", DIM).resolve(wide, ["a", "b"], {}).ring is None


def test_a_count_sketch_wider_than_the_model_is_the_gradient_itself():
    assert Projection("count_sketch", 100).resolve({"w": (5, 5)}, [], {}).kind == "identity"
    assert Projection("count_sketch", 24).resolve({"w": (5, 5)}, [], {}).kind == "count_sketch"


def lookup(positions: int) -> Lookup:
    """Of which some positions look up the same row."""
    return Lookup(torch.randint(0, 8, (6, positions)), torch.randn(6, positions, 20), 30)


FACTORS = {
    "one position": lambda: [outer(30, 20)],
    "few positions": lambda: [outer(30, 20, 5)],
    "many positions": lambda: [outer(30, 20, 60)],
    "a table": lambda: [lookup(7)],
    "a table used twice": lambda: [outer(30, 20, 5), lookup(7)],
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("large", [1, 2**22])
@pytest.mark.parametrize("widest", [4096, 25])
def test_a_pilots_moments_are_those_of_the_formed_gradients(monkeypatch, name, large, widest):
    """Σ G Gᵀ, Σ Gᵀ G and Σ‖G‖², by positions or not; a side that is too wide has none."""
    monkeypatch.setattr(kronecker, "_LARGE", large)
    monkeypatch.setattr(kronecker, "_MAX_EIGEN", widest)
    factors, whole, formed = FACTORS[name](), Pilot(), Pilot()
    grad = torch.stack([factor.rows(0, 30) for factor in factors]).sum(0).double()
    for _ in range(2):
        whole.add("w", factors)
        formed.add("w", [Dense(grad.float())])
    left = 2 * torch.einsum("boi,bpi->op", grad, grad)[: widest // 30 * 30, : widest // 30 * 30]
    right = 2 * torch.einsum("boi,boj->ij", grad, grad)
    for pilot in (whole, formed):
        torch.testing.assert_close(pilot.left["w"], left, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(pilot.right["w"], right, rtol=1e-4, atol=1e-4)
        assert pilot.energy["w"] == pytest.approx(float(right.trace()), rel=1e-4)


@pytest.mark.parametrize("turned", [False, True])
@pytest.mark.parametrize("name", [*FACTORS, "two products", "two tables"])
def test_gradients_of_several_uses_add_up_and_so_do_their_norms(name, turned):
    """‖A + B‖² without forming either, of products and lookups that meet in the same rows."""
    more = {
        "two products": lambda: [outer(30, 20, 3), outer(30, 20, 4)],
        "two tables": lambda: [lookup(3), lookup(5)],
    }
    factors = (FACTORS | more)[name]()[:: -1 if turned else 1]
    grad = sum(Dense(factor.rows(0, 30)).grad.double() for factor in factors)
    torch.testing.assert_close(materialise(factors).double(), grad, rtol=1e-5, atol=1e-5)
    wanted = grad.square().sum((1, 2)).float()
    torch.testing.assert_close(tiling.square_norm(factors), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gram_square_norm(factors), wanted, rtol=1e-5, atol=1e-5)


SIZES = {"wide": (40, 30), "head": (3, 20), "bias": (8, 1), "unused": (5, 4)}  # 1,288 numbers


def pilot(**norms: float) -> Pilot:
    """Of one example, whose gradient has these norms."""
    found = Pilot()
    for name, shape in SIZES.items():
        grad = torch.randn(1, *shape)
        found.add(name, [Dense(grad * (norms.get(name, 0.0) / grad.norm()))])
    return found


@pytest.mark.parametrize("dim", [1, 2, 3, 40, 300, 1267, 1288, 5000])
def test_bases_of_several_parameters_use_the_numbers_asked_for(dim):
    """Never more; a block is a rectangle, so of each less than its longer side may be missing."""
    found = pilot(wide=1.0, head=1.0, bias=2.0)
    shares = found.shares(dim, SIZES)
    assert sum(shares.values()) == min(dim, 1288)
    bases = found.bases(SIZES, shares, False, 0)
    counts = {name: len(left) * len(right) for name, (left, right) in bases.items()}
    for name, share in shares.items():
        assert share - max(SIZES[name]) < counts.get(name, 0) <= share <= np.prod(SIZES[name])
    again = found.bases(SIZES, counts, False, 0)  # the layout of the rows tells all of it
    assert again.keys() == bases.keys()
    assert all(torch.equal(a, b) for n in bases for a, b in zip(again[n], bases[n], strict=True))
    assert Projection("kronecker", dim).bind(SIZES, bases).dim == sum(counts.values()) > 0


@pytest.mark.parametrize("dim", [40, 300])
def test_what_a_parameter_cannot_take_goes_to_the_others_by_their_norms(dim):
    """share_p = min(size_p, t·‖∇_p‖) with one t for all, to one number."""
    norms = {"wide": 1.0, "head": 0.5, "bias": 2.0}
    shares = pilot(**norms).shares(dim, SIZES)

    def given(t: float) -> float:
        return sum(min(np.prod(SIZES[name]), t * norm) for name, norm in norms.items())

    level = brentq(lambda t: given(t) - dim, 0, 1e4)
    for name, share in shares.items():
        assert abs(share - min(np.prod(SIZES[name]), level * norms.get(name, 0.0))) <= 1


def test_a_parameter_without_a_share_has_no_block_and_keeps_its_norm(tmp_path):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(8, 6), torch.nn.Tanh(), torch.nn.Linear(6, 3))
    data: Any = torch.randn(20, 8), torch.arange(20) % 3
    task = tda.Task(model, [model.state_dict()], measurement="cross_entropy")
    options = {"projection": "kronecker", "dtype": "float32", "progress": False}
    few = tda.index(task, data, tmp_path / "few", proj_dim=2, **options)
    whole = tda.index(task, data, tmp_path / "whole", proj_dim=10**6, **options)
    assert few.store.manifest["projection"]["dim"] == 2 == len(few.store.manifest["layers"])
    assert whole.store.manifest["projection"]["dim"] == sum(p.numel() for p in model.parameters())
    one, other = (run.store.table("train").column("grad_norm")[0] for run in (few, whole))
    np.testing.assert_allclose(one, other, rtol=1e-5)


def test_a_run_goes_on_in_the_numbers_it_has(tmp_path, monkeypatch):
    """Of a kronecker projection its bases count, not how a version shares numbers out."""
    data: Any = torch.randn(20, 8), torch.arange(20) % 3
    task = tda.Task(torch.nn.Linear(8, 3), measurement="cross_entropy")
    options = {"projection": "kronecker", "proj_dim": 20, "dtype": "float32", "progress": False}
    with monkeypatch.context() as earlier:
        earlier.setattr(Pilot, "shares", lambda *given: {"weight": 9, "bias": 2})
        tda.index(task, tuple(values[:12] for values in data), tmp_path / "run", **options)
    run = tda.index(task, data, tmp_path / "run", **options)
    assert run.store.manifest["projection"]["dim"] == 11 and len(run.ids) == 20
    name = tda.open(tmp_path / "run", task).add_queries(data, "same")
    one, other = (run.store.table(t).rows(0, 0, 20) for t in ("train", f"queries/{name}"))
    torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("decay", [0.5, 2.0], ids=["flat", "steep"])
def test_leading_vectors_hold_as_much_as_eigenvectors(decay):
    """Subspace iteration on a wide side: orthonormal, and the trace within 1 % of the most."""
    size, rank = 300, 10
    basis = torch.linalg.qr(torch.randn(size, size).double())[0]
    values = torch.arange(1, size + 1).double() ** -decay
    moment = (basis * values) @ basis.T
    found = _leading(moment, rank, 0, "w")
    torch.testing.assert_close(found.T @ found, torch.eye(rank).double(), rtol=0, atol=1e-10)
    assert float((found * (moment @ found)).sum()) > 0.99 * float(values[:rank].sum())
    assert torch.equal(found, _leading(moment, rank, 0, "w"))


def test_leading_vectors_of_a_moment_of_low_rank():
    """Units that are never active leave zeros: what is spanned is found to the last digit."""
    factor = torch.randn(300, 5).double()
    factor[::2] = 0
    found = _leading(factor @ factor.T, 10, 0, "w")
    torch.testing.assert_close(found @ (found.T @ factor), factor, rtol=0, atol=1e-8)


@by_form
def test_coordinates_of_a_filter_are_counted_channel_by_channel_last(form):
    """As of the matrix whose columns are in the order (kernel, channel), whatever the form."""
    kernel, channels = 6, 4
    gradients = torch.randn(5, 10, channels, kernel)
    turned = gradients.mT.flatten(2)
    sketch = count_sketch(form, 3, (10, 24), filters={"w": kernel})
    plain = count_sketch(form, 3, (10, 24))
    found = sketched(sketch, Dense(gradients.flatten(2)))
    torch.testing.assert_close(found, sketched(plain, Dense(turned)))


def test_filters_are_remembered_and_rows_are_those_of_gradients(tmp_path):
    """However gradients are taken: from patches, or whole by plain autograd."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(
        torch.nn.Conv2d(16, 4, 3, padding=1), torch.nn.ReLU(), torch.nn.Flatten(),
        torch.nn.Linear(4 * 25, 3),
    )  # fmt: skip
    data = torch.randn(6, 16, 5, 5), torch.arange(6) % 3
    task = tda.Task(model, [model.state_dict()], measurement="cross_entropy")
    run = tda.index(task, data, tmp_path / "run", proj_dim=DIM, dtype="float32", progress=False)
    assert run.store.manifest["projection"]["filters"] == {"0.weight": 9}
    stored = run.store.table("train").rows(0, 0, 6)
    shapes = {n: (len(p), p.numel() // len(p)) for n, p in model.named_parameters()}
    spec = run.store.manifest["projection"]
    sketch = CountSketch(DIM, 0, shapes, spec.get("rank_one", ()), spec["filters"])
    buffer = sketch.zeros(6)
    rows = []
    for x, y in zip(*data, strict=True):
        log_p = model(x[None]).log_softmax(1)[0]
        margin = log_p[y] - torch.log1p(-log_p[y].exp())
        rows.append(torch.autograd.grad(margin, list(model.parameters())))
    for place, name in enumerate(shapes):
        grads = torch.stack([row[place].reshape(shapes[name]) for row in rows])
        sketch.add(buffer, name, [Dense(grads)])
    torch.testing.assert_close(stored, sketch.rows(buffer), rtol=1e-3, atol=1e-4)
