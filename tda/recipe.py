"""A method of attribution as a value: every choice a published method makes, and nothing else.

mean_of_products:  score[q, i] = scale · Σ_c w_c ⟨F(H_c) q_c, t_{i,c}⟩ / norms
product_of_means:  score[q, i] = scale · (Σ_c w_c ⟨F(H_c) q_c, ∇f_{i,c}⟩) · (Σ_c w_c w_{i,c})

c runs over checkpoints. ∇f is the projected gradient of the measured output f, and every example is
a multiple of it: −∇ℓ = −ℓ'(f)·∇f ("loss"), or the gradient that raises the margin ("margin": ∇f
where the measurement has a margin, else −∇ℓ). Both point to "better", so a positive score always
means that training on i helps q.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_type_hints

from tda.errors import RecipeError

Gradient = Literal["loss", "margin"]
Curvature = Literal["identity", "diagonal", "gram"]
CurvatureRows = Literal["loss", "margin", "link"]
Function = Literal["identity", "inverse"]
Normalize = Literal["none", "query", "train", "both"]
CheckpointWeight = Literal["mean", "learning_rate"]
Combine = Literal["mean_of_products", "product_of_means"]
Scale = Literal["one", "inverse_n"]


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How scores are made from stored gradients; checks itself when made.

    query, train       which gradient stands for an example: q = w_q·∇f_q, t_i = w_i·∇f_i.
    curvature          H: absent, the diagonal of, or the whole mean_i h_i ∇f_i∇f_iᵀ.
    curvature_rows     h_i: weight² of the "loss" or "margin" gradient, or "link" for ℓ''(f_i)
                       (generalised Gauss–Newton: exact for losses of a scalar output).
    function           F(H) = I, or (H + λI)⁻¹.
    damping            λ as a multiple of H's mean eigenvalue tr(H)/k, or "auto": λ = tr(H)/n.
    normalize          which sides are divided by their F-norm √(gᵀF(H)g), after preconditioning.
    checkpoint_weight  w_c = 1/C, or the checkpoint's learning rate.
    combine            see the two formulas above.
    scale              1, or 1/n for n training examples.

    Raises RecipeError naming the field, or the two fields that contradict each other.
    """

    name: str
    summary: str
    formula: str
    reference: str
    query: Gradient = "loss"
    train: Gradient = "loss"
    curvature: Curvature = "identity"
    curvature_rows: CurvatureRows = "loss"
    function: Function = "identity"
    damping: float | Literal["auto"] = "auto"
    normalize: Normalize = "none"
    checkpoint_weight: CheckpointWeight = "mean"
    combine: Combine = "mean_of_products"
    scale: Scale = "one"

    def __post_init__(self) -> None:
        for field, hint in _choices().items():
            _check_choice(self, field, get_args(hint))
        _check_damping(self)
        for broken, what, do in _contradictions(self):
            if broken:
                raise RecipeError(what, where=f"recipe {self.name!r}", do=do)

    def explain(self) -> str:
        """The score in one line of mathematics, e.g. for a report's card."""
        factor = "(1/n) · " if self.scale == "inverse_n" else ""
        over = _CHECKPOINTS[self.checkpoint_weight]
        query = "q" if self.function == "identity" else "F q"
        train = f"{_GRADIENTS[self.train]} of the example"
        if self.combine == "product_of_means":
            score, train = f"{over} ⟨{query}, ∇f⟩ × {over} w", f"w·∇f = {train}"
        else:
            score, train = f"{over} ⟨{query}, t⟩", f"t = {train}"
        terms = [
            f"{self.name}: score = {factor}{score}",
            f"q = {_GRADIENTS[self.query]} of the query",
            train,
        ]
        if self.function == "inverse":
            terms.append(f"F = (H + λI)⁻¹, H = {self._curvature()}, λ = {self._damping()}")
        if self.normalize != "none":
            norm = "norm" if self.function == "identity" else "F-norm"
            terms.append(f"of unit {norm}: {_SIDES[self.normalize]}")
        return "; ".join(terms)

    def _curvature(self) -> str:
        whole = f"mean of {_ROWS[self.curvature_rows]}"
        return whole if self.curvature == "gram" else f"diagonal of {whole}"

    def _damping(self) -> str:
        return "tr(H)/n" if self.damping == "auto" else f"{self.damping:g} · tr(H)/k"


_GRADIENTS = {"loss": "−∇loss", "margin": "∇margin"}
_ROWS = {"loss": "∇loss ∇lossᵀ", "margin": "∇margin ∇marginᵀ", "link": "ℓ''(f) ∇f ∇fᵀ"}
_CHECKPOINTS = {
    "mean": "mean over checkpoints of",
    "learning_rate": "sum over checkpoints of learning rate ×",
}
_SIDES = {"query": "q", "train": "t", "both": "q and t"}


def _choices() -> dict[str, Any]:
    hints = get_type_hints(Recipe)
    return {field: hint for field, hint in hints.items() if hint not in (str, hints["damping"])}


def _check_choice(recipe: Recipe, field: str, allowed: tuple[str, ...]) -> None:
    found = getattr(recipe, field)
    if found in allowed:
        return
    near = get_close_matches(str(found), allowed, n=1)
    raise RecipeError(
        f"{field}={found!r} is not a choice a recipe has",
        where=f"recipe {recipe.name!r}",
        wanted="one of " + ", ".join(map(repr, allowed)),
        do=f"did you mean {near[0]!r}?" if near else None,
    )


def _check_damping(recipe: Recipe) -> None:
    found = recipe.damping
    if found == "auto":
        return
    number = isinstance(found, int | float) and not isinstance(found, bool)
    if not number or not math.isfinite(found) or found < 0:
        raise RecipeError(
            "damping is not a number ≥ 0",
            where=f"recipe {recipe.name!r}",
            found=repr(found),
            wanted="'auto', or a multiple of the mean eigenvalue of the curvature such as 0.1",
        )


def _contradictions(recipe: Recipe) -> list[tuple[bool, str, str]]:
    """(is broken, what, what to do) of every pair of fields that cannot both be meant."""
    no_curvature = recipe.curvature == "identity"
    product = recipe.combine == "product_of_means"
    return [
        (
            no_curvature and recipe.function != "identity",
            "function='inverse' needs a curvature to invert, but curvature='identity'",
            "set curvature='gram' or 'diagonal', or function='identity'",
        ),
        (
            not no_curvature and recipe.function == "identity",
            f"curvature={recipe.curvature!r} has no effect under function='identity'",
            "set function='inverse', or curvature='identity'",
        ),
        (
            no_curvature and recipe.damping != "auto",
            "damping has no effect without a curvature",
            "leave damping='auto', or set curvature='gram' and function='inverse'",
        ),
        (
            product and recipe.checkpoint_weight != "mean",
            "product_of_means multiplies two means over checkpoints; weighted by learning rates "
            "it would count each learning rate twice",
            "set checkpoint_weight='mean', or combine='mean_of_products'",
        ),
        (
            product and recipe.normalize in ("train", "both"),
            "product_of_means keeps the weights of a training example apart from its gradient, "
            "so its F-norm at a checkpoint is not defined",
            "set normalize='none' or 'query', or combine='mean_of_products'",
        ),
    ]
