"""Attribution of a difference in performance to what moved: worlds where it is known what did."""

from __future__ import annotations

import numpy as np
import pytest
from scipy import stats
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.linear_model import LogisticRegression

from tda import valuation
from tda.errors import DataError
from tda.valuation import Mechanism

SOURCE = Mechanism(("source",))
INPUT = Mechanism(("x",), ("source",))
LABEL = Mechanism(("y",), ("x", "source"))


def world(seed: int, *, mean=0.0, flip=0.1, share=0.5, n=3000) -> dict[str, np.ndarray]:
    """source → x → y, each of which can be moved alone."""
    rng = np.random.default_rng(seed)
    source = np.where(rng.random(n) < share, "b", "a")
    x = rng.normal(size=(n, 2)) + np.outer(source == "b", [0, 1.5]) + np.array([mean, 0])
    y = (2 * x[:, 0] + x[:, 1] + rng.logistic(size=n) > 0).astype(int)
    return {"source": source, "x": x, "y": np.where(rng.random(n) < flip, 1 - y, y)}


def wrong(data) -> np.ndarray:
    """Loss of one fixed, imperfect model."""
    return ((data["x"] @ [1, 0.8] > 0.3) != data["y"]).astype(float)


def explained(mechanisms=(SOURCE, INPUT, LABEL), **moved) -> valuation.Shift:
    old, new = world(0), world(1, **moved)
    return valuation.explain_shift(old, new, wrong(old), wrong(new), mechanisms)


@pytest.mark.parametrize(
    ("moved", "at"), [({"share": 0.98}, 0), ({"mean": 1.0}, 1), ({"flip": 0.35}, 2)]
)
def test_the_one_mechanism_that_moved_gets_all_the_difference(moved, at):
    """Up to the chance error of the data (.01) and of the ratios."""
    found = explained(**moved)
    assert found.value[at] == pytest.approx(found.observed, abs=0.025)
    others = np.delete(found.value, at)
    np.testing.assert_allclose(others, 0, atol=0.02)
    assert found.value.sum() == pytest.approx(found.explained)  # Shapley's efficiency
    assert found.explained + found.unexplained == pytest.approx(found.observed)


def test_opposite_shifts_are_told_apart_though_they_cancel():
    """More noise costs what easier inputs give: the observed difference hides both."""
    found = explained(mean=1.0, flip=0.2)
    assert found.value[1] < -0.03 and found.value[2] > 0.03
    assert abs(found.unexplained) < 2 * found.observed_error + 0.01


def test_no_shift_is_called_chance():
    found = explained()
    assert "within chance" in found.verdict
    np.testing.assert_allclose(found.value, 0, atol=0.015)


def test_density_ratio_of_two_gaussians_is_known():
    """p(x − 1)/p(x) = exp(x − ½), clear of the tails."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=4000), 1 + rng.normal(size=6000)
    ratio = valuation.density_ratio(old, new)
    near = np.abs(old) < 2
    np.testing.assert_allclose(np.log(ratio)[near], (old - 0.5)[near], atol=0.15)
    assert ratio.mean() == pytest.approx(1, abs=0.05)


def test_a_density_ratio_is_a_number_or_refused():
    """Neither NaN among the quantities nor a classifier's of a column without variance."""
    flat = np.ones(40)
    with pytest.raises(DataError, match=r"of the target is not finite[^§]*example 3"):
        valuation.density_ratio(flat, np.where(np.arange(40) == 3, np.nan, 1.0))

    class Unsure(LogisticRegression):
        def predict_proba(self, x):
            return np.where(x[:, :1] == 7, np.nan, super().predict_proba(x))

    marked = np.where(np.arange(40) == 5, 7.0, 1.0)
    with pytest.raises(DataError, match=r"no probability[^§]*example 5[^§]*nan of Unsure"):
        valuation.density_ratio(marked, flat, Unsure())
    assert np.isfinite(valuation.density_ratio(flat, flat)).all()


def test_density_ratio_of_categories_is_a_quotient_of_counts():
    """Shares 3:1 against 1:1: 2/3 and 2."""
    old, new = np.array(["a", "a", "a", "b"] * 500), np.array(["a", "b"] * 800)
    ratio = valuation.density_ratio(old, new)
    np.testing.assert_allclose(ratio, np.where(old == "a", 2 / 3, 2), rtol=0.06)


def test_shares_of_rare_categories_are_moved_exactly():
    """v = Σ_k (p_target(k) − p_source(k)) · mean_source(ℓ | k), though none has 20 examples."""
    rng = np.random.default_rng(0)
    names = np.array(list("ABCDEF"))
    counts = np.array([[15, 15, 12, 3, 3, 3], [3, 3, 3, 12, 15, 15]])
    places = [np.repeat(np.arange(6), count) for count in counts]
    old, new = (place / 5 + rng.normal(0, 0.05, len(place)) for place in places)
    means = [old[places[0] == k].mean() for k in range(6)]
    exact = (counts[1] - counts[0]) @ means / counts[0].sum()
    columns = [{"source": names[place]} for place in places]
    found = valuation.explain_shift(*columns, old, new, [SOURCE])
    assert found.value[0] == pytest.approx(exact, abs=0.02)
    assert found.effective[0] < 0.4


def test_a_tail_of_rare_categories_costs_no_examples():
    """Nothing moved: of 200 categories, those too rare to tell have the ratio of the tail."""
    rng = np.random.default_rng(0)
    shares = 1 / np.arange(1, 201)
    old, new = rng.choice(200, (2, 2000), p=shares / shares.sum())
    found = valuation.explain_shift(
        {"source": old}, {"source": new}, old / 200, new / 200, [SOURCE]
    )
    assert found.effective[0] > 0.9
    assert found.value[0] == pytest.approx(0, abs=found.observed_error)


def test_worlds_that_do_not_overlap_are_not_judged():
    """Far apart, few source examples count once weighted, and ratios are cut: it says so."""
    found = explained((Mechanism(("x",)),), mean=5.0)
    assert found.effective_all < 0.1 and found.clipped > 0.5
    assert found.verdict.startswith("not reliable")


@pytest.mark.parametrize("apart", [4, 8, 20])
def test_what_lies_apart_is_not_covered(apart):
    """E_source[w] is p_target of where the source lies, about 0, though weights are all alike."""
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=500), apart + rng.normal(size=500)
    found = valuation.explain_shift({"x": old}, {"x": new}, old, new, [Mechanism(("x",))])
    assert found.effective[0] == found.effective_all < 0.1
    assert found.verdict.startswith("not reliable")


def test_other_categories_are_not_covered():
    old, new = np.repeat("a", 300), np.repeat("b", 300)
    metric = np.random.default_rng(0).normal(size=300)
    found = valuation.explain_shift({"source": old}, {"source": new}, metric, 1 + metric, [SOURCE])
    assert found.verdict.startswith("not reliable")


def test_effective_share_is_kishs():
    """(E w)²/E w² of exp(δx − δ²/2) is exp(−δ²); δ = ½ gives .78."""
    found = explained((Mechanism(("x",)),), mean=0.5)
    assert found.effective[0] == pytest.approx(np.exp(-0.25), abs=0.06)


def test_standard_error_is_the_scatter_over_source_samples():
    """With the ratio known (a classifier that knows both Gaussians), over 60 draws."""

    class Knowing(ClassifierMixin, BaseEstimator):
        def fit(self, x, y):
            self.classes_ = np.array([0, 1])
            return self

        def predict(self, x):
            return self.predict_proba(x)[:, 1] > 0.5

        def predict_proba(self, x):
            p = stats.norm.pdf(x[:, 0], 0.5)
            p = p / (p + stats.norm.pdf(x[:, 0]))
            return np.stack([1 - p, p], axis=1)

    rng, found = np.random.default_rng(0), []
    for _ in range(60):
        old, new = rng.normal(size=400), 0.5 + rng.normal(size=400)
        found.append(
            valuation.explain_shift(
                {"x": old}, {"x": new}, old**2, new**2, [Mechanism(("x",))], classifier=Knowing()
            )
        )
    scatter = np.std([one.value[0] for one in found], ddof=1)
    assert np.mean([one.standard_error[0] for one in found]) == pytest.approx(scatter, rel=0.25)
    assert np.mean([one.value[0] for one in found]) == pytest.approx(0.25, abs=0.05)  # 1.25 − 1


def test_wide_embeddings_are_reduced_first():
    rng = np.random.default_rng(0)
    old, new = rng.normal(size=(2000, 100)), rng.normal(size=(2000, 100))
    old[:, 0] *= 5
    new[:, 0] = 5 * new[:, 0] + 5
    ratio = valuation.density_ratio(old, new)
    assert np.corrcoef(np.log(ratio), old[:, 0])[0, 1] > 0.8


def test_mechanisms_that_make_no_sense_are_refused():
    data = world(0, n=50)
    with pytest.raises(DataError, match="no such column"):
        valuation.explain_shift(data, data, wrong(data), wrong(data), [Mechanism(("z",))])
    with pytest.raises(DataError, match="drawn by two"):
        valuation.explain_shift(data, data, wrong(data), wrong(data), [INPUT, Mechanism(("x",))])
    with pytest.raises(DataError, match="cannot be used"):
        valuation.explain_shift(data, data, wrong(data) * np.nan, wrong(data), [INPUT])
    for absent in (np.nan, np.inf):
        holed = {**data, "x": np.where(np.arange(50)[:, None] == 7, absent, data["x"])}
        with pytest.raises(DataError, match="'x' of the target is not finite") as raised:
            valuation.explain_shift(data, holed, wrong(data), wrong(data), [INPUT])
        assert raised.value.where == "example 7"
    assert str(LABEL) == "P(y | x, source)"
