"""Cosine of loss gradients."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="grad_cos",
    summary="The direction of grad_dot alone: blind to how large either gradient is.",
    formula="mean_c ⟨∇ℓ_q, ∇ℓ_i⟩ / (‖∇ℓ_q‖ ‖∇ℓ_i‖)",
    reference="Charpiat et al. 2019, Input Similarity from the Neural Network Perspective",
    normalize="both",
)
