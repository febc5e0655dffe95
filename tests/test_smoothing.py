"""Copies of a model with noise on its weights: what they are, and what a mean over them is."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import tda
from tda.errors import MismatchError, TaskError
from tda.recipe import Recipe
from tda.scorer.replicates import trainings
from tda.training.noise import with_noise
from tda.weights import digest_of

FEATURES = 6
MEAN = tda.RECIPES["grad_dot"]


class Tied(nn.Module):
    """An embedding that is its own head, a frozen layer and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 8)
        self.frozen = nn.Linear(8, 8).requires_grad_(False)
        self.norm = nn.BatchNorm1d(8)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.norm(self.frozen(self.embedding(x))))


def regression() -> tuple[nn.Module, tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """y = wᵀx with ½(y − t)²: gradients are known in closed form."""
    random = torch.Generator().manual_seed(0)
    model = nn.Sequential(nn.Linear(FEATURES, 1, bias=False), nn.Flatten(0))
    train, test = (
        (torch.randn(n, FEATURES, generator=random), torch.randn(n, generator=random))
        for n in (20, 5)
    )
    return model, train, test


def half_square(model: nn.Module, batch: tuple[Tensor, Tensor]) -> Tensor:
    return 0.5 * (model(batch[0]) - batch[1]).square()


def indexed(path, checkpoints, **options):
    model, train, test = regression()
    task = tda.Task(model, checkpoints=checkpoints, measurement=half_square)
    run = tda.index(
        task, train, path, projection=tda.Projection("identity"), dtype="float32", progress=False,
        **options,
    )  # fmt: skip
    run.add_queries(test, "queries")
    return run


def test_a_pair_lies_opposite_around_the_weights():
    weights = nn.Linear(40, 30).state_dict()
    task = tda.Task(nn.Linear(40, 30), checkpoints=tda.smoothed(weights, 4))
    for first in (0, 2):
        plus, minus = task.weights(first), task.weights(first + 1)
        for name, value in weights.items():
            torch.testing.assert_close((plus[name] + minus[name]) / 2, value)
            assert (plus[name] != value).all()
    assert digest_of(task.weights(0)) != digest_of(task.weights(2))


@pytest.mark.parametrize("noise", [0.25, 2.0])
def test_the_noise_is_normal_and_in_units_of_the_median_weight(noise):
    model = nn.Sequential(nn.Linear(200, 100), nn.Linear(100, 10))
    weights = model.state_dict()
    moved = with_noise(weights, model, noise, seed=3)
    every = torch.cat([weights[name].flatten() for name in weights])
    steps = torch.cat([(moved[name] - weights[name]).flatten() for name in weights])
    steps = steps / (noise * every.abs().median())
    n = len(steps)
    assert abs(float(steps.mean())) < 5 / n**0.5
    assert abs(float(steps.square().mean()) - 1) < 5 * (2 / n) ** 0.5
    assert abs(float(steps.pow(4).mean()) - 3) < 5 * (96 / n) ** 0.5


def test_noise_is_the_same_on_every_machine():
    model = nn.Linear(3, 1, bias=False)
    weights = {"weight": torch.tensor([[1.0, -4.0, 2.0]])}  # of median magnitude 2
    drawn = np.random.Generator(np.random.PCG64(0)).standard_normal(3, np.float32)
    assert drawn.tolist() == pytest.approx([1.117622, -1.387125, -0.4265716], rel=1e-6)
    moved = with_noise(weights, model, 0.5, seed=0)["weight"]
    assert moved[0].tolist() == (weights["weight"][0] + torch.from_numpy(drawn)).tolist()


def test_what_is_tied_stays_tied_and_what_is_not_trained_stays_as_it_is():
    model = Tied()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    moved = with_noise(weights, model, 0.5, seed=0)
    assert moved.keys() == weights.keys()
    assert torch.equal(moved["embedding.weight"], moved["head.weight"])
    changed = {name for name in weights if not torch.equal(moved[name], weights[name])}
    assert changed == {"embedding.weight", "head.weight", "norm.weight", "norm.bias"}
    named_once = {name: value for name, value in weights.items() if name != "embedding.weight"}
    again = with_noise(named_once, model, 0.5, seed=0)
    assert torch.equal(again["head.weight"], moved["head.weight"])


def test_the_mean_of_a_pair_is_even_in_the_noise(tmp_path):
    """Of a linear model, with r = wᵀx − t and δ the noise: the mean over ±δ of the products of
    gradients is (r_q r_i + δᵀx_q δᵀx_i)·x_qᵀx_i, for what is linear in δ cancels."""
    model, (x, t), (x_q, t_q) = regression()
    weights = {"0.weight": model[0].weight.detach().clone()}
    run = indexed(tmp_path / "run", tda.smoothed(weights, 2, noise=0.5))
    w = weights["0.weight"][0].double()
    noise = with_noise(weights, model, 0.5, seed=0)["0.weight"][0].double() - w
    (a, b), (x, x_q) = (
        (v.double() @ w - u for v, u in ((x_q, t_q), (x, t))),
        (x.double(), x_q.double()),
    )
    wanted = (a[:, None] * b + (x_q @ noise)[:, None] * (x @ noise)) * (x_q @ x.T)
    found = run.scores("queries", recipe=MEAN).compute()
    np.testing.assert_allclose(found, wanted.numpy(), rtol=1e-4, atol=1e-5)


def test_many_copies_begin_with_a_few_and_a_run_grows_by_them(tmp_path):
    model, train, _ = regression()
    few, many = tda.smoothed(model.state_dict(), 2), tda.smoothed(model.state_dict(), 4)
    grown = indexed(tmp_path / "grown", few)
    task = tda.Task(model, checkpoints=many, measurement=half_square)
    grown = tda.index(task, train, tmp_path / "grown", progress=False,
                      projection=tda.Projection("identity"), dtype="float32")  # fmt: skip
    whole = tda.index(task, train, tmp_path / "whole", progress=False,
                      projection=tda.Projection("identity"), dtype="float32")  # fmt: skip
    for checkpoint in range(4):
        rows = [run.store.table("train").rows(checkpoint, 0, 20) for run in (grown, whole)]
        assert torch.equal(*rows)


def test_other_noise_is_another_run(tmp_path):
    weights = regression()[0].state_dict()
    indexed(tmp_path / "run", tda.smoothed(weights, 2, noise=0.5))
    with pytest.raises(MismatchError, match="checkpoint"):
        indexed(tmp_path / "run", tda.smoothed(weights, 2, noise=0.4))


def test_a_path_of_checkpoints_stays_one_within_every_copy():
    weights = nn.Linear(2, 2).state_dict()
    path = [tda.Checkpoint(weights, step=s, learning_rate=0.1, name=f"s{s}") for s in (10, 20)]
    copies = tda.smoothed(path, 4)
    assert [c.name for c in copies] == [
        "s10+0", "s20+0", "s10-0", "s20-0", "s10+1", "s20+1", "s10-1", "s20-1",
    ]  # fmt: skip
    assert [c.step for c in copies] == [10, 20] * 4


def of_weights(*weights: dict[str, Tensor], steps: int | None = 100) -> list[tda.Checkpoint]:
    return [tda.Checkpoint(w, step=steps, learning_rate=0.1) for w in weights]


@pytest.mark.parametrize("steps", [100, None])
def test_copies_are_of_one_training_and_seeds_stay_apart(steps):
    """Noise is not another seed: intervals must not take one for the other."""
    first, second = (nn.Linear(2, 2).state_dict() for _ in range(2))
    recipe: Recipe = tda.RECIPES["influence"]

    def found(checkpoints):
        records = tda.Task(nn.Linear(2, 2), checkpoints=checkpoints).manifest()["checkpoints"]
        return trainings(records, recipe)

    assert found(tda.smoothed(of_weights(first, steps=steps), 4)) == ([[0], [1], [2], [3]], False)
    if steps is not None:
        both = tda.smoothed(of_weights(first, second), 4)
        assert found(both) == ([[0, 2, 4, 6], [1, 3, 5, 7]], True)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"count": 3}, "even number"),
        ({"count": 0}, "even number"),
        ({"count": 2.0}, "even number"),
        ({"noise": 0}, "above 0"),
        ({"noise": float("nan")}, "above 0"),
        ({"noise": float("inf")}, "above 0"),
        ({"noise": "little"}, "above 0"),
        ({"checkpoints": 7}, "a list of state dicts"),
        ({"checkpoints": [7]}, "a state dict, a path"),
    ],
)
def test_what_makes_no_sense_is_refused(options, words):
    given = {"checkpoints": nn.Linear(2, 2).state_dict(), **options}
    with pytest.raises(TaskError, match=words):
        tda.smoothed(**given)


LEVELS = [0.2, 0.25, 0.32, 0.4, 0.5]


def largest(kept: list[float], cosine: float) -> float:
    """Of the levels, 0.2 at least."""
    bear = [level for level, mean in zip(LEVELS, kept, strict=True) if mean >= cosine]
    return max([0.2, *bear])


@pytest.mark.parametrize("cosine", [0.8, 0.93, 0.97, 0.999])
@pytest.mark.parametrize("measurement", [half_square, "squared_error"])
def test_as_much_noise_is_found_as_gradients_keep_their_direction_in(measurement, cosine):
    """Of a linear model ∇ℓ = r·x: a cosine is 1, or −1 where r changes its sign, and all together
    have Σ r r(s) ‖x‖² over the roots of Σ r² ‖x‖² and Σ r(s)² ‖x‖²."""
    model, (x, t), _ = regression()
    weights = {"0.weight": model[0].weight.detach().clone()}
    w, x, t = weights["0.weight"][0].double(), x.double(), t.double()
    step = with_noise(weights, model, 1.0, seed=0)["0.weight"][0].double() - w
    r, length = x @ w - t, x.norm(dim=1)

    def least(level: float) -> float:
        moved = [r + sign * level * (x @ step) for sign in (1, -1)]
        apart = torch.cat([(r * m).sign() for m in moved]).mean()
        pairs = [(r * length, m * length) for m in moved]
        together = [float(a @ b / (a.norm() * b.norm())) for a, b in pairs]
        return min(float(apart), sum(together) / 2)

    kept = [least(level) for level in LEVELS]
    assert kept == sorted(kept, reverse=True) and kept[0] > 0.99 and kept[-1] < 0.9
    task = tda.Task(model, checkpoints=weights, measurement=measurement)
    assert tda.find_noise(task, (x.float(), t.float()), cosine) == largest(kept, cosine)


def test_gradients_that_feel_no_noise_bear_the_most():
    """f = wᵀx has the gradient x whatever w is."""
    model, train, _ = regression()
    task = tda.Task(model, measurement=lambda model, batch: model(batch[0]))
    assert tda.find_noise(task, train) == LEVELS[-1]


def test_noise_is_found_around_the_weights_themselves():
    model, train, _ = regression()
    weights = model.state_dict()
    of_copies = tda.Task(model, checkpoints=tda.smoothed(weights, 2, 1.0), measurement=half_square)
    of_weights = tda.Task(model, checkpoints=weights, measurement=half_square)
    found = [tda.find_noise(task, train) for task in (of_copies, of_weights)]
    assert found[0] == found[1] < LEVELS[-1]
    assert [c.noise for c in of_copies.checkpoints] == [1.0, -1.0]


def test_where_the_least_noise_is_too_much_that_is_said():
    """Fitted to rounding, residuals have whatever sign the noise gives them."""
    model, (x, _), _ = regression()
    with torch.no_grad():
        targets = model(x) + 1e-6
    task = tda.Task(model, measurement=half_square)
    with pytest.raises(TaskError, match="score the model as it is"):
        tda.find_noise(task, (x, targets))


def test_examples_without_a_gradient_have_no_say():
    model, (x, t), _ = regression()
    task = tda.Task(model, measurement=half_square)
    few = torch.cat([x, torch.zeros(30, FEATURES)]), torch.cat([t, torch.zeros(30)])
    assert tda.find_noise(task, few) == tda.find_noise(task, (x, t)) < LEVELS[-1]
    with pytest.raises(TaskError, match="no example has a gradient"):
        tda.find_noise(task, (few[0][20:], few[1][20:]))


def test_of_a_pruned_model_the_weights_that_are_left_give_the_unit():
    model = nn.Linear(200, 100)
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    weights["weight"][torch.rand(100, 200, generator=torch.Generator().manual_seed(0)) < 0.7] = 0
    left = torch.cat([value.flatten() for value in weights.values()]).abs()
    moved = with_noise(weights, model, 0.5, seed=0)["weight"] - weights["weight"]
    assert float(moved.std()) == pytest.approx(0.5 * float(left[left > 0].median()), rel=0.02)
    with pytest.raises(TaskError, match="every weight is zero"):
        with_noise({name: 0 * value for name, value in weights.items()}, model, 0.5, seed=0)


@pytest.mark.parametrize("cosine", [0, 1, 1.5, float("nan"), "most"])
def test_what_is_no_cosine_is_refused(cosine):
    model, train, _ = regression()
    with pytest.raises(TaskError, match="no cosine"):
        tda.find_noise(tda.Task(model, measurement=half_square), train, cosine)
    with pytest.raises(TaskError, match="not a task"):
        tda.find_noise(model, train)
