"""What a schedule says: sums of learning rates, and the damping that they imply."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from tda.training.schedule import by_training, implied_damping, learning_rate_sums


def record(step: int | None = None, rate: float | None = None, **known: Any) -> dict[str, Any]:
    return {"name": "c", "step": step, "learning_rate": rate, "digest": "", **known}


def every_step(rates: list[float], steps: list[int]) -> list[float]:
    """Σ_t η_t up to each step, one step at a time."""
    return [math.fsum(rates[:step]) for step in steps]


def test_a_constant_rate_sums_to_steps_times_rate():
    steps = [10, 25, 100]
    wanted = every_step([0.3] * 100, steps)
    assert learning_rate_sums([record(s, 0.3) for s in steps]) == pytest.approx(wanted)


def test_a_rate_that_falls_at_checkpoints_is_summed_piece_by_piece():
    rates, steps = [0.1] * 20 + [0.01] * 30 + [0.001] * 5, [20, 50, 55]
    found = learning_rate_sums([record(s, rates[s - 1]) for s in steps])
    assert found == pytest.approx(every_step(rates, steps))


def test_a_step_that_does_not_grow_begins_an_independent_run():
    """Three models trained apart; and two runs with two checkpoints each."""
    apart = [record(50, 0.1), record(50, 0.2), record(40, 0.1)]
    assert learning_rate_sums(apart) == pytest.approx([5.0, 10.0, 4.0])
    twice = [record(10, 0.1), record(30, 0.2)] * 2
    assert learning_rate_sums(twice) == pytest.approx([1.0, 5.0, 1.0, 5.0])


def test_a_stated_sum_is_taken_and_built_upon():
    known = [record(10, 0.1, learning_rate_sum=7.0), record(20, 0.1), record(5, 0.1)]
    assert learning_rate_sums(known) == pytest.approx([7.0, 8.0, 0.5])


@pytest.mark.parametrize("lacking", [record(), record(10), record(None, 0.1)])
def test_what_is_not_known_is_not_guessed(lacking: dict[str, Any]):
    assert learning_rate_sums([lacking]) is None
    assert learning_rate_sums([record(5, 0.1), lacking, record(15, 0.1)]) is None
    assert implied_damping([{**lacking, "momentum": 0.0}], 0) is None


def test_a_checkpoint_after_an_unknown_one_is_known_only_by_a_new_run_or_a_stated_sum():
    unknown = record(10, None, momentum=0.0)
    after = record(20, 0.1, momentum=0.0)
    assert implied_damping([unknown, after], 1) is None
    assert implied_damping([unknown, {**after, "step": 10}], 1) == pytest.approx(1.0)
    assert implied_damping([unknown, {**after, "learning_rate_sum": 4.0}], 1) == pytest.approx(0.25)


def test_the_implied_damping_is_weight_decay_plus_one_over_the_length_of_training():
    sgd = record(100, 0.1, momentum=0.9, weight_decay=1e-3)
    assert implied_damping([sgd], 0) == pytest.approx(1e-3 + 0.1 / 10)


def test_the_momentum_of_sgd_must_be_known_and_that_of_adam_is_an_average():
    assert implied_damping([record(100, 0.1)], 0) is None
    adam = record(100, 0.001, optimizer="adam", weight_decay=0.01)
    assert implied_damping([adam], 0) == pytest.approx(0.01 + 1 / 0.1)


def test_no_training_implies_no_damping():
    assert implied_damping([record(0, 0.1, momentum=0.0)], 0) is None


@pytest.mark.parametrize("momentum", [0.0, 0.9])
@pytest.mark.parametrize("decay", [0.0, 0.05])
def test_the_implied_inverse_is_what_gradient_descent_did(momentum: float, decay: float):
    """On a quadratic the response to a constant force is (1−e^{−τσ})/σ, τ = Ση/(1−β): the implied
    inverse is within a quarter of it everywhere, and equal at both ends of the curvature.
    """
    steps, rate = 2000, 0.01
    curvature = np.array([0.0, 1e-4, 1e-2, 0.1, 1.0, 10.0])
    moved, velocity = np.zeros(6), np.zeros(6)
    for _ in range(steps):
        velocity = momentum * velocity + (1.0 - (curvature + decay) * moved)
        moved = moved + rate * velocity
    known = record(steps, rate, momentum=momentum, weight_decay=decay)
    damping = implied_damping([known], 0)
    assert damping is not None
    ratio = (1 / (curvature + damping)) / moved
    assert np.all((ratio > 0.75) & (ratio < 1.02))
    assert ratio[-1] == pytest.approx(1.0, abs=0.02)
    if not decay:
        assert ratio[0] == pytest.approx(1.0, abs=0.02)


def weights(digest: str, step: int | None, noise_of: str | None = None) -> dict[str, Any]:
    known = {} if noise_of is None else {"noise_of": noise_of}
    return {**record(step), "digest": digest, **known}


def test_copies_are_of_the_training_of_all_they_were_copied_from():
    """Of two trainings from one initialisation, and of a model beside its own copies."""
    two = [weights("init", 1), weights("a", 10), weights("init", 1), weights("b", 10)]
    assert by_training(two) == [[0, 1], [2, 3]]
    copied = [weights(f"{c['digest']}{s}", c["step"], c["digest"]) for s in "+-" for c in two]
    assert by_training(copied) == [[0, 1, 4, 5], [2, 3, 6, 7]]
    beside = [weights("a", 10), weights("a+", 10, "a"), weights("a-", 10, "a"), weights("b", 10)]
    assert by_training(beside) == [[0, 1, 2], [3]]
    assert by_training([weights("a", None), weights("b", None)]) == [[0, 1]]
