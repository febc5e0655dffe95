"""LESS: the cosine of a query with the step Adam takes on the example."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="less",
    summary="How well the step Adam takes on the example points to where the query would go.",
    formula="Σ_c η_c ⟨∇ℓ_q, Γ_i⟩ / (‖∇ℓ_q‖ ‖Γ_i‖), Γ = m'/(√v' + ε) after the gradient ∇ℓ_i",
    reference="Xia et al. 2024, LESS: Selecting Influential Data for Targeted Instruction Tuning, "
    "definition 3.1",
    normalize="both",
    checkpoint_weight="learning_rate",
    metric="adam_update",
)
