"""The whole engine again, slow and obvious, in float64: the oracle of every theorem in these tests.

Nothing here is shared with ``tda``. Gradients are one ``torch.autograd.grad`` per example, methods
are the formulas of their papers with explicit matrices, leave-one-out is an exact refit.
Conventions: n training examples, m queries, C checkpoints, p parameters (those that require a
gradient, in the order of ``model.named_parameters()``, flattened row-major, tied ones once).
Scores are [m, n]; positive means that the training example helps the query.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np
import scipy.linalg
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

Array = np.ndarray


@dataclass(frozen=True)
class Outcome:
    """What one example measures: the differentiated scalar f, the loss ℓ, and ℓ''(f)."""

    f: Tensor
    loss: Tensor
    curvature: float = 1.0
    p: float = float("nan")
    has_margin: bool = False


@dataclass(frozen=True)
class Rows:
    """All examples at one checkpoint: ∇f and ∇ℓ [n, p]; loss, p and ℓ''(f) [n]."""

    df: Array
    dl: Array
    loss: Array
    p: Array
    curvature: Array
    has_margin: bool

    @property
    def slope(self) -> Array:
        """ℓ'(f) [n], from ∇ℓ = ℓ'(f)·∇f by least squares along ∇f."""
        return (self.df * self.dl).sum(1) / (self.df**2).sum(1)

    @property
    def margin(self) -> Array:
        """The gradient that raises the margin, or lowers the loss where there is none [n, p]."""
        return self.df if self.has_margin else -self.dl

    def project(self, matrix: Array) -> Rows:
        """Rows of the projected gradients P∇, P [k, p]."""
        kept = {field.name: getattr(self, field.name) for field in fields(self)}
        return Rows(**{**kept, "df": self.df @ matrix.T, "dl": self.dl @ matrix.T})


def as_double(batch: Any) -> Any:
    """The same batch with float64 in place of every floating tensor."""
    if isinstance(batch, Tensor):
        return batch.double() if batch.is_floating_point() else batch
    if isinstance(batch, Mapping):
        return {name: as_double(value) for name, value in batch.items()}
    return type(batch)(as_double(v) for v in batch) if isinstance(batch, list | tuple) else batch


def flat_gradient(output: Tensor, model: nn.Module) -> Array:
    """∇output [p] in the order of the parameters, zero where a parameter is not used."""
    wanted = [p for _, p in model.named_parameters() if p.requires_grad]
    grads = torch.autograd.grad(
        output, wanted, retain_graph=True, allow_unused=True, materialize_grads=True
    )
    return torch.cat([g.reshape(-1) for g in grads]).detach().numpy()


def rows(
    model: nn.Module,
    weights: Mapping[str, Tensor],
    dataset: Any,
    outcome: Callable[[nn.Module, Any], Outcome],
) -> Rows:
    """Per-example gradients by a plain loop over batches of one, float64, evaluation mode."""
    model = copy.deepcopy(model)
    model.load_state_dict(weights)
    model = model.double().eval()
    found = []
    for i in range(len(dataset)):
        one = outcome(model, as_double(default_collate([dataset[i]])))
        found.append((one, flat_gradient(one.f, model), flat_gradient(one.loss, model)))
    return Rows(
        df=np.stack([df for _, df, _ in found]),
        dl=np.stack([dl for _, _, dl in found]),
        loss=np.array([one.loss.item() for one, _, _ in found]),
        p=np.array([one.p for one, _, _ in found]),
        curvature=np.array([one.curvature for one, _, _ in found]),
        has_margin=found[0][0].has_margin,
    )


# Methods: each takes the rows of the queries and of the training set, one entry a checkpoint.


def grad_dot(queries: Sequence[Rows], train: Sequence[Rows]) -> Array:
    """mean_c ⟨∇ℓ_q, ∇ℓ_i⟩."""
    return np.mean([q.dl @ t.dl.T for q, t in zip(queries, train, strict=True)], axis=0)


def grad_cos(queries: Sequence[Rows], train: Sequence[Rows]) -> Array:
    """mean_c cos(∇ℓ_q, ∇ℓ_i)."""
    return np.mean([unit(q.dl) @ unit(t.dl).T for q, t in zip(queries, train, strict=True)], axis=0)


def tracin(
    queries: Sequence[Rows], train: Sequence[Rows], learning_rates: Sequence[float]
) -> Array:
    """Σ_c η_c ⟨∇ℓ_q, ∇ℓ_i⟩ (Pruthi et al. 2020, TracInCP)."""
    terms = zip(queries, train, learning_rates, strict=True)
    return np.sum([eta * q.dl @ t.dl.T for q, t, eta in terms], axis=0)


def trak(queries: Sequence[Rows], train: Sequence[Rows], damping: float | str = "auto") -> Array:
    """mean_c[φ_q (ΦᵀΦ + nλI)⁻¹ ∇f_i] ⊙ mean_c[−ℓ'_i]  (Park et al. 2023, eq. 13 and 17).

    φ = ∇f of the margin f = log(p/(1−p)), for which −ℓ' = 1−p; without a margin φ = −∇ℓ.
    """
    kernels, weights = [], []
    for q, t in zip(queries, train, strict=True):
        phi, n = t.margin, len(t.df)
        second_moment = phi.T @ phi
        total = second_moment + n * absolute(damping, second_moment / n, n) * np.eye(phi.shape[1])
        kernels.append(q.margin @ np.linalg.solve(total, t.df.T))
        weights.append(1 - t.p if t.has_margin else -t.slope)
    return np.mean(kernels, axis=0) * np.mean(weights, axis=0)


def influence(
    queries: Sequence[Rows], train: Sequence[Rows], damping: float | str = "auto"
) -> Array:
    """mean_c (1/n) ∇ℓ_qᵀ (H + λI)⁻¹ ∇ℓ_i, H = mean_i ℓ''_i ∇f_i ∇f_iᵀ (Koh & Liang 2017, eq. 2)."""
    return with_curvature(queries, train, [link_hessian(t) for t in train], damping)


def d_trak(queries: Sequence[Rows], train: Sequence[Rows], damping: float | str = "auto") -> Array:
    """mean_c φ_q (ΦᵀΦ + nλI)⁻¹ φ_i (Zheng et al. 2024, §3): the kernel of TRAK alone."""
    scores = []
    for q, t in zip(queries, train, strict=True):
        n, moment = len(t.df), t.margin.T @ t.margin
        scores.append(q.margin @ np.linalg.solve(n * damped(moment / n, damping, n), t.margin.T))
    return np.mean(scores, axis=0)


def relatif(
    queries: Sequence[Rows], train: Sequence[Rows], damping: float | str = "auto", *, step: bool
) -> Array:
    """Influence over ‖(H+λI)⁻¹∇ℓ_i‖ (θ), or √(∇ℓ_iᵀ(H+λI)⁻¹∇ℓ_i) (ℓ) (Barshan et al. 2020, §4)."""
    scores = []
    for q, t in zip(queries, train, strict=True):
        n = len(t.df)
        steps = np.linalg.solve(damped(link_hessian(t), damping, n), t.dl.T).T
        price = np.sqrt((steps**2).sum(1) if step else (t.dl * steps).sum(1))
        scores.append(q.dl @ steps.T / price / n)
    return np.mean(scores, axis=0)


def datainf(
    queries: Sequence[Rows],
    train: Sequence[Rows],
    layers: Sequence[slice],
    damping: float | str = 0.1,
) -> Array:
    """Σ_layer (1/n) ∇ℓ_qᵀ [mean_j (∇ℓ_j∇ℓ_jᵀ + λI)⁻¹] ∇ℓ_i, every inverse by itself (eq. 5)."""
    scores = []
    for q, t in zip(queries, train, strict=True):
        n, total = len(t.df), 0
        for layer in layers:
            g = t.dl[:, layer]
            lam = absolute(damping, g.T @ g / n, n)
            inverses = [np.linalg.inv(np.outer(x, x) + lam * np.eye(g.shape[1])) for x in g]
            total = total + q.dl[:, layer] @ np.mean(inverses, axis=0) @ g.T / n
        scores.append(total)
    return np.mean(scores, axis=0)


def arnoldi(queries: Sequence[Rows], train: Sequence[Rows], rank: int) -> Array:
    """(1/n) Σ_{j ≤ r} ⟨∇ℓ_q, v_j⟩⟨v_j, ∇ℓ_i⟩/σ_j (Schioppa et al. 2022, §3)."""
    scores = []
    for q, t in zip(queries, train, strict=True):
        sigma, v = np.linalg.eigh(link_hessian(t))
        sigma, v = sigma[::-1][:rank], v[:, ::-1][:, :rank]
        scores.append((q.dl @ v / sigma) @ (t.dl @ v).T / len(t.df))
    return np.mean(scores, axis=0)


def trackstar(
    queries: Sequence[Rows],
    train: Sequence[Rows],
    layers: Sequence[slice],
    share: float = 0.9,
    damping: float | str = "auto",
) -> Array:
    """cos(R^{−½}∇ℓ_q, R^{−½}∇ℓ_i), R = s·R_queries + (1−s)·R_train by layer (Chang et al. 2025)."""
    scores = []
    for q, t in zip(queries, train, strict=True):
        n, k = t.dl.shape
        root = np.zeros((k, k))
        for layer in layers:
            a, b = q.dl[:, layer], t.dl[:, layer]
            mixed = share * a.T @ a / len(a) + (1 - share) * b.T @ b / n
            sigma, v = np.linalg.eigh(damped(mixed, damping, n))
            root[layer, layer] = v @ np.diag(sigma**-0.5) @ v.T
        scores.append(unit(q.dl @ root) @ unit(t.dl @ root).T)
    return np.mean(scores, axis=0)


def less(
    queries: Sequence[Rows], updates: Sequence[Array], learning_rates: Sequence[float]
) -> Array:
    """Σ_c η_c cos(∇ℓ_q, Γ_i) (Xia et al. 2024, definition 3.1)."""
    terms = zip(queries, updates, learning_rates, strict=True)
    return np.sum([eta * unit(q.dl) @ unit(gamma).T for q, gamma, eta in terms], axis=0)


def source(
    queries: Sequence[Rows],
    train: Sequence[Rows],
    segments: Sequence[Sequence[int]],
    times: Sequence[float],
    weight_decay: float = 0.0,
) -> Array:
    """(1/n) Σ_l ∇ℓ_qᵀ Π_{j>l} e^{−τ_jH_j} ∫₀^{τ_l} e^{−sH_l} ds ḡ_l (Bae et al. 2024, §3).

    The integral is a block of the exponential of [[−H, I], [0, 0]]: no inverse, no eigenvalues.
    """
    q, n, k = queries[-1].dl, len(train[0].df), train[0].df.shape[1]
    total = np.zeros((len(q), n))
    for segment, time in reversed(list(zip(segments, times, strict=True))):
        hessian = np.mean([link_hessian(train[c]) for c in segment], axis=0)
        hessian = hessian + weight_decay * np.eye(k)
        both = np.block([[-hessian, np.eye(k)], [np.zeros((k, 2 * k))]])
        grown = scipy.linalg.expm(time * both)
        total += q @ grown[:k, k:] @ np.mean([train[c].dl for c in segment], axis=0).T / n
        q = q @ grown[:k, :k]
    return total


def with_curvature(
    queries: Sequence[Rows],
    train: Sequence[Rows],
    curvatures: Sequence[Array],
    damping: float | str = "auto",
) -> Array:
    """mean_c (1/n) ∇ℓ_qᵀ (H + λI)⁻¹ ∇ℓ_i for any H [k, k] a checkpoint."""
    scores = [
        q.dl @ np.linalg.solve(damped(H, damping, len(t.df)), t.dl.T) / len(t.df)
        for q, t, H in zip(queries, train, curvatures, strict=True)
    ]
    return np.mean(scores, axis=0)


def link_hessian(t: Rows) -> Array:
    """mean_i ℓ''_i ∇f_i ∇f_iᵀ [k, k]."""
    return (t.curvature[:, None] * t.df).T @ t.df / len(t.df)


def damped(curvature: Array, damping: float | str, num_train: int) -> Array:
    """H + λI."""
    return curvature + absolute(damping, curvature, num_train) * np.eye(len(curvature))


def absolute(damping: float | str, curvature: Array, num_train: int) -> float:
    """λ: a multiple of the mean eigenvalue tr(H)/k, or tr(H)/n when automatic."""
    trace = float(np.trace(curvature))
    return trace / num_train if damping == "auto" else float(damping) * trace / len(curvature)


def unit(matrix: Array) -> Array:
    """Rows of length one."""
    return matrix / np.linalg.norm(matrix, axis=1, keepdims=True)


def all_recipes(
    queries: Sequence[Rows], train: Sequence[Rows], learning_rates: Sequence[float]
) -> dict[str, Array]:
    """Every published method that needs rows alone, at its default damping, by name."""
    return {
        "grad_dot": grad_dot(queries, train),
        "grad_cos": grad_cos(queries, train),
        "tracin": tracin(queries, train, learning_rates),
        "trak": trak(queries, train),
        "influence": influence(queries, train),
        "d_trak": d_trak(queries, train),
        "relatif": relatif(queries, train, step=True),
        "relatif_l": relatif(queries, train, step=False),
    }


# Exact refits: what leaving one example out really does.


def ridge_fit(x: Array, y: Array, alpha: float, weights: Array) -> Array:
    """argmin_w mean_i c_i ½(x_i·w − y_i)² + ½α‖w‖²  [d]; c_i = 0 leaves example i out."""
    scaled = weights[:, None] * x
    return np.linalg.solve(
        scaled.T @ x / len(x) + alpha * np.eye(x.shape[1]), scaled.T @ y / len(x)
    )


def logistic_fit(x: Array, y: Array, alpha: float, weights: Array) -> Array:
    """argmin_w mean_i c_i log(1+exp(−(2y_i−1) x_i·w)) + ½α‖w‖² by Newton's method [d]."""
    w = np.zeros(x.shape[1])
    for _ in range(50):
        p = 1 / (1 + np.exp(-x @ w))
        gradient = (weights * (p - y)) @ x / len(x) + alpha * w
        hessian = (x * (weights * p * (1 - p))[:, None]).T @ x / len(x) + alpha * np.eye(len(w))
        w = w - np.linalg.solve(hessian, gradient)
        if np.abs(gradient).max() < 1e-13:
            break
    return w


def leave_one_out(
    fit: Callable[[Array, Array, float, Array], Array],
    loss: Callable[[Array, Array, Array], Array],
    train: tuple[Array, Array],
    queries: tuple[Array, Array],
    alpha: float,
) -> Array:
    """Rise of each query's loss when each example is left out and the model refitted [m, n]."""
    n = len(train[0])
    full = loss(fit(*train, alpha, np.ones(n)), *queries)
    without = [fit(*train, alpha, 1.0 - np.eye(n)[i]) for i in range(n)]
    return np.stack([loss(w, *queries) - full for w in without], axis=1)


# How far apart two answers are.


def relative_error(found: Array, wanted: Array) -> float:
    """max|found − wanted| / max|wanted|; infinite when a shape or a finite value is missing."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float(np.abs(found - wanted).max() / np.abs(wanted).max())


def row_error(found: Array, wanted: Array) -> float:
    """max_i ‖found_i − wanted_i‖ / ‖wanted_i‖ over rows [n, p]."""
    if found.shape != wanted.shape or not np.isfinite(found).all():
        return float("inf")
    return float((np.linalg.norm(found - wanted, axis=1) / np.linalg.norm(wanted, axis=1)).max())
