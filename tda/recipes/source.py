"""SOURCE: training unrolled, segment by segment, in closed form."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="source",
    summary="What training on the example did to the final model, converged or not.",
    formula="(1/n) Σ_l ∇ℓ_qᵀ Π_{j>l} e^{−τ_j H_j} · (I − e^{−τ_l H_l}) H_l⁻¹ · mean_{c in l} ∇ℓ_i, "
    "τ_l = Σ_t η_t/(1−β)",
    reference="Bae et al. 2024, Training Data Attribution via Approximate Unrolling, section 3",
    curvature="gram",
    curvature_rows="link",
    function="unrolled",
    segments=3,
    scale="inverse_n",
)
