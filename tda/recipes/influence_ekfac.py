"""Influence function with the curvature factored by layer (EK-FAC)."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="influence_ekfac",
    summary="As influence, with a curvature that is diagonal in the eigenbasis of K-FAC.",
    formula="mean_c (1/n) Σ_j q_j t_j / (Λ_j + λ), q and t = ∇ℓ in the eigenbasis, no biases and "
    "norms, Λ_j = mean_i ℓ''(f_i) (∇f_i)_j²",
    reference="Grosse et al. 2023, Studying Large Language Model Generalization with Influence "
    "Functions, section 3, with the eigenvalues of George et al. 2018",
    curvature="diagonal",
    curvature_rows="link",
    function="inverse",
    scale="inverse_n",
    basis="eigen",
    parameters="matrices",
)
