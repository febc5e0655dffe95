"""Inner product of loss gradients."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="grad_dot",
    summary="How far one small gradient step on the training example lowers the query's loss.",
    formula="mean_c ⟨∇ℓ_q, ∇ℓ_i⟩",
    reference="Charpiat et al. 2019, Input Similarity from the Neural Network Perspective",
)
