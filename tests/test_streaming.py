"""`tda.attribute` against explicit matrices in float64."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import naive
import numpy as np
import problems
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.curvature.kfac import EkFac, fit_ekfac
from tda.errors import GradientError, RecipeError, TaskError
from tda.gradients import Dense, Lookup, Outer, shapes_of
from tda.recipe import Recipe
from tda.unprojected import streaming

EKFAC = replace(tda.RECIPES["influence_ekfac"], parameters="all")
# An MLP, a CNN with groups, a language model with a tied embedding and a norm.
NAMES = ["digits_mlp", "cnn", "tiny_lm"]


def attribute(task: tda.Task, problem: problems.Problem, recipe: Any, **options: Any) -> np.ndarray:
    given = {"progress": False, "batch_size": 4, **options}
    return tda.attribute(task, problem.train, problem.queries, recipe, **given)


ROWS: dict[tuple[str, int], list[naive.Rows]] = {}


def naive_rows(problem: problems.Problem, data: Any) -> list[naive.Rows]:
    """Rows of every checkpoint, worked out once."""
    key = problem.name, len(data)
    if key not in ROWS:
        ROWS[key] = [
            naive.rows(problem.make(), w.state, data, problem.outcome) for w in problem.checkpoints
        ]
    return ROWS[key]


def blocks(problem: problems.Problem, flat: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
    """Whole gradients [n, p] as (parameter, [n, O·I])."""
    first = 0
    for name, (height, width) in shapes_of(problem.make()).items():
        yield name, flat[:, first : first + height * width]
        first += height * width


def explicit_ekfac(problem: problems.Problem, rows: naive.Rows, name: str, ekfac: EkFac) -> Any:
    """(U ⊗ V) diag(Λ) (U ⊗ V)ᵀ of one parameter [O·I, O·I] by a Kronecker product, Λ from naive
    gradients. U and V are the engine's: where eigenvalues are equal, any basis is as good."""
    weighted = dict(blocks(problem, np.sqrt(rows.curvature)[:, None] * rows.df))[name]
    block = ekfac.blocks[name]
    height, width = block.eigenvalues.shape
    left = np.eye(height) if block.left is None else block.left.double().numpy()
    right = np.eye(width) if block.right is None else block.right.double().numpy()
    basis = np.kron(left, right)
    return basis.T @ (((weighted @ basis.T) ** 2).mean(0)[:, None] * basis)


def undrawn(task: tda.Task) -> tda.Task:
    """The task with a likelihood that is not known: H is that of the data's own targets."""
    task.measurement = replace(task.measurement, draw=None)
    return task


@pytest.mark.parametrize("name", [*NAMES, "lstm", "integers", "several_inputs"])
@pytest.mark.parametrize("recipe", ["grad_dot", "tracin", "grad_cos"])
def test_without_curvature_it_is_the_written_out_formula(name, recipe, task_of):
    problem = problems.problem(name)
    queries, train = (naive_rows(problem, data) for data in (problem.queries, problem.train))
    wanted = naive.all_recipes(queries, train, problem.learning_rates)[recipe]
    found = attribute(task_of(problem), problem, recipe)
    assert found.dtype == np.float32
    assert naive.relative_error(found, wanted) < 1e-4


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("damping", [0.3, "auto"])
def test_ekfac_is_its_kronecker_matrices_inverted(name, damping, task_of):
    """mean_c (1/n) ∇ℓ_qᵀ (⊕ (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ + λI)⁻¹ ∇ℓ_i, λ = damping · mean Λ, of
    which automatic damping takes a tenth, whatever the schedule."""
    problem = problems.problem(name)
    task = undrawn(task_of(problem))
    fitted = [fit_ekfac(task, problem.train, c, progress=False) for c in range(2)]
    task.checkpoints = task.checkpoints[:2]
    wanted = []
    for c, ekfac in enumerate(fitted):
        queries, train = (naive_rows(problem, d)[c] for d in (problem.queries, problem.train))
        matrices = {n: explicit_ekfac(problem, train, n, ekfac) for n in ekfac.blocks}
        trace = sum(np.trace(matrix) for matrix in matrices.values())
        lam = (0.1 if damping == "auto" else damping) * trace / train.df.shape[1]
        parts = [
            q @ np.linalg.solve(matrices[n] + lam * np.eye(len(matrices[n])), t.T)
            for (n, q), (_, t) in zip(
                blocks(problem, queries.dl), blocks(problem, train.dl), strict=True
            )
        ]
        wanted.append(sum(parts) / 10)
    found = attribute(task, problem, EKFAC, damping=damping)
    assert naive.relative_error(found, np.mean(wanted, axis=0)) < 1e-3


def one_checkpoint(problem: problems.Problem, **known: Any) -> tda.Task:
    checkpoint = tda.Checkpoint(problem.checkpoints[0].state, **known)
    return undrawn(tda.Task(problem.make(), [checkpoint], problem.measurement))


def damped_blocks(problem: problems.Problem, ekfac: EkFac, lam: dict[str, float]) -> Any:
    """F of every parameter [O·I, O·I]."""
    train = naive_rows(problem, problem.train)[0]
    return {
        n: np.linalg.inv(
            explicit_ekfac(problem, train, n, ekfac) + lam[n] * np.eye(b.eigenvalues.numel())
        )
        for n, b in ekfac.blocks.items()
    }


def products(
    problem: problems.Problem, q: np.ndarray, t: np.ndarray, matrices: dict[str, np.ndarray]
) -> np.ndarray:
    pairs = zip(blocks(problem, q), blocks(problem, t), strict=True)
    return sum(a @ matrices[n] @ b.T for (n, a), (_, b) in pairs)


def test_damping_by_layer_is_relative_to_the_layers_own_mean():
    problem = problems.problem("digits_mlp")
    task = one_checkpoint(problem)
    ekfac = fit_ekfac(task, problem.train, progress=False)
    lam = {n: 0.1 * float(b.eigenvalues.mean()) for n, b in ekfac.blocks.items()}
    queries, train = (naive_rows(problem, d)[0] for d in (problem.queries, problem.train))
    matrices = damped_blocks(problem, ekfac, lam)
    wanted = products(problem, queries.dl, train.dl, matrices) / 10
    found = attribute(task, problem, replace(EKFAC, blocks="layer"), damping=0.1, ekfac=ekfac)
    assert naive.relative_error(found, wanted) < 1e-3


def test_a_rank_keeps_the_largest_eigenvalues_of_all_layers():
    problem = problems.problem("digits_mlp")
    task = one_checkpoint(problem)
    ekfac = fit_ekfac(task, problem.train, progress=False)
    every = torch.cat([b.eigenvalues.flatten() for b in ekfac.blocks.values()])
    least = float(every.sort(descending=True).values[4])
    matrices = {}
    for name, block in ekfac.blocks.items():
        kept = torch.where(block.eigenvalues >= least, 1 / block.eigenvalues, 0)
        eye = torch.eye(kept.numel()).reshape(-1, *kept.shape).double()
        exact = replace(block, left=_double(block.left), right=_double(block.right))
        matrices[name] = exact.apply(kept, eye).flatten(1).numpy()
    queries, train = (naive_rows(problem, d)[0] for d in (problem.queries, problem.train))
    wanted = products(problem, queries.dl, train.dl, matrices) / 10
    found = attribute(task, problem, replace(EKFAC, rank=5), damping=0.0, ekfac=ekfac)
    assert naive.relative_error(found, wanted) < 1e-3


def _double(side: Tensor | None) -> Tensor | None:
    return None if side is None else side.double()


@pytest.mark.parametrize("norm", ["metric", "step"])
@pytest.mark.parametrize("weights", [(), (("0.weight", 3.0), ("3.bias", 0.0))])
def test_norms_are_taken_after_preconditioning(norm, weights):
    """√(gᵀα∘Fg) or √(Fgᵀα∘Fg) on both sides, in the preconditioned space."""
    problem = problems.problem("digits_mlp")
    task = one_checkpoint(problem)
    ekfac = fit_ekfac(task, problem.train, progress=False)
    lam = 0.1 * ekfac.trace / ekfac.dim
    plain = damped_blocks(problem, ekfac, dict.fromkeys(ekfac.blocks, lam))
    alpha = {n: dict(weights).get(n, 1.0) for n in plain}
    heavy = {n: alpha[n] * f for n, f in plain.items()}
    lengths = {n: alpha[n] * (f if norm == "metric" else f @ f) for n, f in plain.items()}
    q, t = (naive_rows(problem, d)[0].dl for d in (problem.queries, problem.train))
    sides = [np.sqrt(np.diag(products(problem, g, g, lengths))) for g in (q, t)]
    wanted = products(problem, q, t, heavy) / sides[0][:, None] / sides[1]
    recipe = replace(EKFAC, normalize="both", norm=norm, layer_weights=weights, scale="one")
    found = attribute(task, problem, recipe, damping=0.1, ekfac=ekfac)
    assert naive.relative_error(found, wanted) < 1e-3


def test_products_of_means_are_those_of_the_checkpoints(task_of):
    """(Σ_c w ⟨F ∇f_q, ∇f_i⟩) · (Σ_c w (1 − p_i)), as in TRAK."""
    problem = problems.problem("digits_mlp")
    recipe = Recipe(
        name="products", summary="", formula="", reference="", query="margin",
        combine="product_of_means",
    )  # fmt: skip
    queries, train = (naive_rows(problem, data) for data in (problem.queries, problem.train))
    kernel = np.mean([q.df @ t.df.T for q, t in zip(queries, train, strict=True)], axis=0)
    wanted = kernel * np.mean([1 - t.p for t in train], axis=0)
    assert naive.relative_error(attribute(task_of(problem), problem, recipe), wanted) < 1e-4


@pytest.mark.parametrize("name", ["digits_mlp", "callable_loss"])
def test_the_whole_gauss_newton_matrix_is_solved_by_conjugate_gradients(name):
    """influence_cg = (1/n) ∇ℓ_qᵀ (G + λI)⁻¹ ∇ℓ_i with G formed in full."""
    problem = problems.problem(name)
    known = {"learning_rate_sum": 100.0, "momentum": 0.0}
    task = tda.Task(
        problem.make(), [tda.Checkpoint(problem.checkpoints[0].state, **known)], problem.measurement
    )
    queries, train = (naive_rows(problem, d)[0] for d in (problem.queries, problem.train))
    if name == "callable_loss":  # a loss whose likelihood is not known: its own gradients make G
        matrix = train.dl.T @ train.dl / 10
    else:
        matrix = softmax_gauss_newton(problem)
    damped = matrix + 0.01 * np.eye(len(matrix))
    wanted = queries.dl @ np.linalg.solve(damped, train.dl.T) / 10
    found = attribute(task, problem, "influence_cg")
    assert naive.relative_error(found, wanted) < 0.01


def softmax_gauss_newton(problem: problems.Problem) -> np.ndarray:
    """mean_i Jᵀ (diag p − ppᵀ) J [p, p], J by autograd."""
    model = problem.make()
    model.load_state_dict(problem.checkpoints[0].state)
    model = model.double().eval()
    total = 0.0
    for x, _ in problem.train.examples:
        logits = model(x.double()[None])[0]
        jacobian = np.stack([naive.flat_gradient(z, model) for z in logits])
        p = logits.softmax(0).detach().numpy()
        total = total + jacobian.T @ (np.diag(p) - np.outer(p, p)) @ jacobian / 10
    return total


class Counted:
    """A data set that counts how often each example is read."""

    def __init__(self, data: Any) -> None:
        self.data, self.reads = data, [0] * len(data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> Any:
        self.reads[index] += 1
        return self.data[index]


def test_training_gradients_are_computed_once_for_all_queries():
    """With a curvature that is given, each example is read once, however many queries there are.

    Without, twice more for each checkpoint's curvature, and once for the probabilities of classes.
    """
    problem = problems.problem("digits_mlp")
    task = tda.Task(problem.make(), [problem.checkpoints[0].state], problem.measurement)
    train = Counted(problem.train)
    ekfac = fit_ekfac(task, problem.train, progress=False)
    backwards: list[int] = []
    for queries in (problem.queries, problems.Listed(problem.train.examples * 4)):
        train.reads = [0] * 10
        seen = Spied.around(backwards)
        with seen:
            tda.attribute(task, train, queries, EKFAC, ekfac=ekfac, batch_size=4, progress=False)
        assert train.reads == [1] * 10
        assert backwards == [4] * (len(queries) // 4) + [len(queries) % 4] * (
            len(queries) % 4 > 0
        ) + [4, 4, 2]


class Spied:
    """Notes the size of every batch that gradients are taken of."""

    def __init__(self, sizes: list[int]) -> None:
        self.sizes = sizes

    @staticmethod
    def around(sizes: list[int]) -> Spied:
        sizes.clear()
        return Spied(sizes)

    def __enter__(self) -> None:
        self.real = streaming.Gradients.__call__

        def call(gradients: Any, batch: Any, num_examples: int, consume: Any) -> Any:
            self.sizes.append(num_examples)
            return self.real(gradients, batch, num_examples, consume)

        streaming.Gradients.__call__ = call  # type: ignore[method-assign]

    def __exit__(self, *error: object) -> None:
        streaming.Gradients.__call__ = self.real  # type: ignore[method-assign]


@pytest.mark.parametrize("recipe", ["grad_dot", EKFAC], ids=["grad_dot", "ekfac"])
def test_scores_do_not_depend_on_batches(recipe):
    problem = problems.problem("digits_mlp")
    task = tda.Task(problem.make(), [problem.checkpoints[0].state], problem.measurement)
    one, other = (attribute(task, problem, recipe, batch_size=b) for b in (3, 10))
    assert naive.relative_error(one, other) < 1e-3


def test_every_form_of_gradient_is_contracted_alike(monkeypatch):
    """⟨q, G⟩ by factors, by tiles and in pieces is that of the matrices."""
    monkeypatch.setattr(streaming, "_TILE_FLOATS", 150)
    for factor in (
        Outer(torch.randn(4, 1, 1, 6), torch.randn(4, 1, 1, 5)),
        Outer(torch.randn(4, 3, 1, 6), torch.randn(4, 3, 1, 5)),
        Outer(torch.randn(4, 3, 2, 3), torch.randn(4, 3, 2, 5)),
        Lookup(torch.randint(0, 6, (4, 7)), torch.randn(4, 7, 5), 6),
        Dense(torch.randn(4, 6, 5)),
    ):
        for m in (2, 9):
            q = torch.randn(m, 6, 5)
            wanted = torch.einsum("moi,boi->mb", q, factor.rows(0, 6))
            torch.testing.assert_close(streaming.contract(q, factor), wanted, rtol=1e-4, atol=1e-4)


def test_queries_that_do_not_fit_into_memory_are_refused(monkeypatch):
    problem = problems.problem("digits_mlp")
    size = 4 * sum(p.numel() for p in problem.make().parameters())
    monkeypatch.setattr(streaming, "_memory", lambda device: 2 * 2 * size)
    with pytest.raises(TaskError, match="at most 2 queries") as error:
        attribute(one_checkpoint(problem), problem, "grad_dot")
    assert "GiB" in str(error.value)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"basis": "any"}, "basis='eigen'"),
        ({"curvature_rows": "loss"}, "gauss_newton"),
        ({"query_share": 0.5}, "index a run"),
        ({"curvature": "gram", "curvature_rows": "gauss_newton", "normalize": "train"}, "queries"),
        ({"layer_weights": (("nothing", 2.0),)}, "named_parameters"),
    ],
)
def test_what_has_no_meaning_is_refused(change, match):
    problem = problems.problem("digits_mlp")
    with pytest.raises(RecipeError, match=match):
        attribute(one_checkpoint(problem), problem, replace(EKFAC, **change))


def test_each_checkpoint_needs_its_curvature(task_of):
    problem = problems.problem("digits_mlp")
    ekfac = fit_ekfac(one_checkpoint(problem), problem.train, progress=False)
    with pytest.raises(TaskError, match="each checkpoint"):
        attribute(task_of(problem), problem, EKFAC, ekfac=ekfac)


def test_an_example_without_a_finite_gradient_is_named():
    data = (torch.tensor([[1.0], [2.0], [float("nan")]]), torch.zeros(3))
    task = tda.Task(nn.Linear(1, 1), measurement="squared_error")
    with pytest.raises(GradientError, match="finite") as error:
        tda.attribute(task, data, (data[0][:2], data[1][:2]), "grad_dot", progress=False)
    assert "example 2" in str(error.value)


def test_a_store_in_the_eigenbasis_gives_the_same_scores(tmp_path):
    """With every coordinate kept; fewer keep most of it."""
    problem = problems.problem("integers")
    checkpoint = tda.Checkpoint(problem.checkpoints[0].state)
    task = tda.Task(problem.make(), [checkpoint], problem.measurement)
    wanted = attribute(task, problem, EKFAC)
    for dim, error in ((1000, 1e-3), (12, 0.1)):
        run = tda.index(task, problem.train, tmp_path / str(dim), projection="eigenbasis",
                        proj_dim=dim, dtype="float32", progress=False)  # fmt: skip
        found = run.scores(problem.queries, EKFAC).compute()
        assert naive.relative_error(found, wanted) < error


@pytest.mark.parametrize("name", ["digits_mlp", "tiny_lm"])
def test_matrices_alone_are_all_parameters_with_vectors_at_weight_zero(name, task_of, tmp_path):
    """With a run in the eigenbasis and without one; a weight that is named stays."""
    problem, task = problems.problem(name), one_checkpoint(problems.problem(name))
    vectors = [n for n, p in task.model.named_parameters() if p.ndim == 1]
    assert 0 < len(vectors) < len(list(task.model.parameters()))
    ekfac = fit_ekfac(task, problem.train, progress=False)
    alone = replace(EKFAC, parameters="matrices")
    zeros = tuple((n, 0.0) for n in vectors)
    named = ((vectors[0], 0.5),)
    for recipe, weights in (
        (alone, zeros),
        (replace(alone, layer_weights=named), named + zeros[1:]),
    ):
        every = replace(EKFAC, layer_weights=weights)
        wanted = attribute(task, problem, every, ekfac=ekfac)
        assert np.array_equal(attribute(task, problem, recipe, ekfac=ekfac), wanted)
    assert not np.allclose(attribute(task, problem, EKFAC, ekfac=ekfac), wanted, rtol=1e-3)
    run = tda.index(task, problem.train, tmp_path, projection="eigenbasis", proj_dim=64,
                    progress=False)  # fmt: skip
    kept = [layer["name"] for layer in run.store.manifest["layers"]]
    weights = tuple((n, 0.0) for n in vectors if n in kept)
    found = run.scores(problem.queries, alone).compute()
    wanted = run.scores(problem.queries, replace(EKFAC, layer_weights=weights)).compute()
    assert np.array_equal(found, wanted)


def test_a_model_of_vectors_alone_keeps_them():
    problem = problems.problem("digits_mlp")
    task = one_checkpoint(problem)
    for parameter in task.model.parameters():
        parameter.requires_grad_(parameter.ndim == 1)
    every = attribute(task, problem, EKFAC)
    assert np.array_equal(attribute(task, problem, "influence_ekfac"), every)
    assert every.any()


def test_scores_of_drawn_labels_repeat():
    problem = problems.problem("digits_mlp")
    task = tda.Task(problem.make(), [problem.checkpoints[0].state], problem.measurement)
    first, again, other = (attribute(task, problem, EKFAC, seed=seed) for seed in (0, 0, 1))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)
