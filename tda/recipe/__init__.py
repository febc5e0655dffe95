"""A method of attribution as a value: every choice a published method makes, and nothing else.

mean_of_products:  score[q, i] = scale · Σ_c w_c ⟨α ∘ F(H_c) q_c, t_{i,c}⟩ / norms
product_of_means:  score[q, i] = scale · (Σ_c w_c ⟨α ∘ F(H_c) q_c, ∇f_{i,c}⟩) · (Σ_c w_c w_{i,c})

c runs over checkpoints. ∇f is the stored gradient of the measured output f, and every example is a
multiple of it: −∇ℓ = −ℓ'(f)·∇f ("loss"), or the gradient that raises the margin ("margin": ∇f
where the measurement has a margin, else −∇ℓ). Both point to "better", so a positive score always
means that training on i helps q. α is one weight a layer.
"""

from __future__ import annotations

from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, Literal, get_args, get_origin, get_type_hints

from tda.errors import RecipeError
from tda.recipe.contradictions import contradictions, wrong_numbers

Gradient = Literal["loss", "margin"]
Curvature = Literal["identity", "diagonal", "gram"]
CurvatureRows = Literal["loss", "margin", "link", "gauss_newton"]
Blocks = Literal["whole", "layer"]
Function = Literal["identity", "inverse", "mean_of_inverses", "unrolled"]
Normalize = Literal["none", "query", "train", "both"]
Norm = Literal["metric", "step"]
CheckpointWeight = Literal["mean", "learning_rate"]
Combine = Literal["mean_of_products", "product_of_means"]
Scale = Literal["one", "inverse_n"]
Basis = Literal["any", "eigen"]
Metric = Literal["any", "adam", "second_moment", "adam_update"]
Space = Literal["stored", "parameters"]
Parameters = Literal["all", "matrices"]
DIAGONAL_DAMPING = 0.1  # of an EK-FAC, in mean eigenvalues


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """How scores are made from stored gradients; checks itself when made.

    query, train       which gradient stands for an example: q = w_q·∇f_q, t_i = w_i·∇f_i.
    curvature          H: absent, the diagonal of, or the whole mean_i h_i ∇f_i∇f_iᵀ.
    curvature_rows     h_i: weight² of the "loss" or "margin" gradient; "link" for ℓ''(f_i)
                       (Gauss–Newton, exact for losses of a scalar output); "gauss_newton" for
                       rows of the run's table ``curvature``, of examples with labels the model
                       gives them: H = Σ_y p(y)·∇ℓ_iy∇ℓ_iyᵀ.
    blocks             H whole, or layer by layer, each block with its own λ.
    shrinkage          s: what is not on the diagonal of H is multiplied by 1 − s.
    core               H is whole among this many coordinates of its largest diagonal, and diagonal
                       on all others; None for all.
    query_share        s: H = s·(mean over the queries) + (1−s)·(mean over the training set).
    function           F(H) = I; (H + λI)⁻¹; mean_i (h_i∇f_i∇f_iᵀ + λI)⁻¹; or training unrolled,
                       F_l = (1 − e^{−τ_l H_l})/H_l · Π_{j>l} e^{−τ_j H_j}, H_l with λ added, for
                       segment l of the checkpoints, q at the last one, τ_l = Σ_t η_t/(1−β) in l.
    damping            λ as a multiple of H's mean eigenvalue tr(H)/k, or "auto": weight decay +
                       (1−β)/Σ_t η_t where H is Gauss–Newton and the run tells its schedule, else
                       tr(H)/n; 0.1 · tr(H)/k of a diagonal, and both by their shares if shrunk;
                       weight decay alone if unrolled. k counts parameters in an eigenbasis.
    rank               F on this many of the largest eigenvalues (of a block), 0 on the others.
    segments           of the checkpoints, at most as many as there are.
    normalize, norm    which sides are divided by their length after preconditioning: √(gᵀFg)
                       ("metric"), or that of the step it causes, ‖Fg‖ ("step").
    layer_weights      (layer, α ≥ 0): weights of layers in every product; 1 for those not named.
    parameters         α of the biases and norms that are not named there: 1 ("all"), or 0
                       ("matrices"). Where every parameter is a block of its own they would count
                       twice: what a bias does, the weights of its layer do through mean inputs.
    checkpoint_weight  w_c = 1/C, or the checkpoint's learning rate.
    combine            see the two formulas above.
    scale              1, or 1/n for n training examples.
    basis, metric      what the run must have been indexed with: rows in the eigenbasis of K-FAC;
                       gradients in the metric of Adam, divided by the roots of its second moments,
                       or training gradients as the updates Adam makes of them.
    space              "parameters": not projected, for `tda.attribute`, which has the model.

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
    blocks: Blocks = "whole"
    shrinkage: float = 0.0
    core: int | None = None
    query_share: float = 0.0
    function: Function = "identity"
    damping: float | Literal["auto"] = "auto"
    rank: int | None = None
    segments: int = 1
    normalize: Normalize = "none"
    norm: Norm = "metric"
    layer_weights: tuple[tuple[str, float], ...] = ()
    parameters: Parameters = "all"
    checkpoint_weight: CheckpointWeight = "mean"
    combine: Combine = "mean_of_products"
    scale: Scale = "one"
    basis: Basis = "any"
    metric: Metric = "any"
    space: Space = "stored"

    def __post_init__(self) -> None:
        for field, hint in get_type_hints(Recipe).items():
            if get_origin(hint) is Literal:
                _check_choice(self, field, get_args(hint))
        where = f"recipe {self.name!r}"
        for wrong, what, wanted in wrong_numbers(self):
            if wrong:
                found = repr(getattr(self, what.split()[0]))
                raise RecipeError(what, where=where, found=found, wanted=wanted)
        for broken, what, do in contradictions(self):
            if broken:
                raise RecipeError(what, where=where, do=do)

    def explain(self) -> str:
        """The score in one line of mathematics, e.g. for a report's card."""
        train = f"{_GRADIENTS[self.train]} of the example"
        if self.combine == "product_of_means":
            train = f"w·∇f = {train}"
        else:
            train = f"t = {train}"
        at = " at the last checkpoint" if self.function == "unrolled" else ""
        terms = [
            f"{self.name}: score = {self._score()}",
            f"q = {_GRADIENTS[self.query]} of the query{at}",
            train,
        ]
        if self.function != "identity":
            terms += [self._function(), self._curvature(), f"λ = {self._damping()}"]
        if self.normalize != "none":
            terms.append(f"of unit {self._norm()}: {_SIDES[self.normalize]}")
        if self.layer_weights:
            named = ", ".join(f"{name} {weight:g}" for name, weight in self.layer_weights)
            terms.append(f"products of layers weighted: {named}, others 1")
        if self.parameters == "matrices":
            terms.append("biases and norms left out")
        terms += [
            words[choice]
            for words, choice in ((_BASES, self.basis), (_METRICS, self.metric))
            if choice != "any"
        ]
        if self.space == "parameters":
            terms.append("gradients not projected")
        return "; ".join(terms)

    def _score(self) -> str:
        factor = "(1/n) · " if self.scale == "inverse_n" else ""
        if self.function == "unrolled":
            parts = f"{self.segments} segments" if self.segments > 1 else "1 segment"
            return f"{factor}sum over {parts} of the checkpoints of ⟨F q, mean of t⟩"
        over = _CHECKPOINTS[self.checkpoint_weight]
        query = "q" if self.function == "identity" else "F q"
        if self.combine == "product_of_means":
            return f"{factor}{over} ⟨{query}, ∇f⟩ × {over} w"
        return f"{factor}{over} ⟨{query}, t⟩"

    def _function(self) -> str:
        formula = _FUNCTIONS[self.function]
        if self.rank is None:
            return formula
        return f"{formula} on the {self.rank} largest eigenvalues, 0 on the others"

    def _curvature(self) -> str:
        term = _ROWS[self.curvature_rows]
        whole = f"mean of {term}"
        if self.query_share:
            share = f"{self.query_share:g} · mean over the queries"
            whole = f"({share} + {1 - self.query_share:g} · mean over the examples) of {term}"
        parts = "diagonal of " if self.curvature == "diagonal" else ""
        each = ", layer by layer" if self.blocks == "layer" else ""
        shrunk = f", off its diagonal × {1 - self.shrinkage:g}" if self.shrinkage else ""
        core = f", among its {self.core:,} largest coordinates" if self.core else ""
        return f"H = {parts}{whole}{each}{shrunk}{core}"

    def _damping(self) -> str:
        if self.damping != "auto":
            return f"{self.damping:g} · tr(H)/k" if self.damping else "0"
        if self.function == "unrolled":
            return "weight decay, 0 if unknown"
        share, tenth = self.diagonal_share, f"{DIAGONAL_DAMPING:g} · tr(H)/k"
        if share == 1:
            return tenth
        whole = "tr(H)/n"
        if self.implies_damping:
            whole = "weight decay + (1−β)/Σ_t η_t if known, else tr(H)/n"
        return f"{1 - share:g} · ({whole}) + {share:g} · {tenth}" if share else whole

    def absolute_damping(
        self, trace: float, dim: int, num_train: int, implied: float | None = None
    ) -> float:
        """λ in the unit of H's eigenvalues, of which there are k = ``dim`` and tr(H) the sum.

        "auto" is that of (1 − s)·(H + λ_H I) + s·(diag H + λ_D I), s the share of the diagonal, in
        one number. λ_H is what the training schedule implies, or tr(H)/n. λ_D = 0.1 · tr(H)/k, the
        heuristic of Grosse et al. 2023: the diagonal has not H's small eigenvalues, and λ_H would
        come on top of what is too large already. Judged in jobs/LEADERBOARD.md.
        """
        if self.damping != "auto":
            return self.damping * trace / dim
        whole = trace / num_train if implied is None else implied
        share = self.diagonal_share
        return (1 - share) * whole + share * DIAGONAL_DAMPING * trace / dim

    @property
    def diagonal_share(self) -> float:
        """Of H: what the automatic damping turns on."""
        return 1.0 if self.curvature == "diagonal" else self.shrinkage

    @property
    def by_layer(self) -> bool:
        """Whether it asks for rows that keep layers apart."""
        return self.blocks == "layer" or self.weighs_layers

    @property
    def weighs_layers(self) -> bool:
        """Whether some layers count more than others."""
        return bool(self.layer_weights) or self.parameters == "matrices"

    @property
    def implies_damping(self) -> bool:
        """Whether H is in the unit of a training schedule, which then implies a damping."""
        return self.curvature_rows in ("link", "gauss_newton") and not self.query_share

    def _norm(self) -> str:
        if self.function == "identity":
            return "norm"
        return "F-norm √(gᵀFg)" if self.norm == "metric" else "step ‖Fg‖"


_GRADIENTS = {"loss": "−∇loss", "margin": "∇margin"}
_FUNCTIONS = {
    "inverse": "F = (H + λI)⁻¹",
    "mean_of_inverses": "F = mean of (h + λI)⁻¹ over the terms h of H",
    "unrolled": "F = (1 − e^{−τG})/G · Π e^{−τG} of later segments, G = H + λI, τ = Σ_t η_t/(1−β)",
}
_ROWS = {
    "loss": "∇loss ∇lossᵀ",
    "margin": "∇margin ∇marginᵀ",
    "link": "ℓ''(f) ∇f ∇fᵀ",
    "gauss_newton": "Σ_y p(y) ∇loss_y ∇loss_yᵀ over labels y",
}
_CHECKPOINTS = {
    "mean": "mean over checkpoints of",
    "learning_rate": "sum over checkpoints of learning rate ×",
}
_SIDES = {"query": "q", "train": "t", "both": "q and t"}
_BASES = {"eigen": "rows in the eigenbasis of K-FAC"}
_METRICS = {
    "adam": "gradients times (√v + ε)^−½, the metric of Adam",
    "second_moment": "gradients divided by √v + ε of Adam",
    "adam_update": "training gradients as the updates m/(√v + ε) Adam makes of them",
}


def _check_choice(recipe: Any, field: str, allowed: tuple[str, ...]) -> None:
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
