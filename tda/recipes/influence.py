"""Influence function with the generalised Gauss–Newton curvature."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="influence",
    summary="Predicted rise of the query's loss if the example were left out and the model refit.",
    formula="mean_c (1/n) ∇ℓ_qᵀ (H + λI)⁻¹ ∇ℓ_i, H = mean_i ℓ''(f_i) ∇f_i∇f_iᵀ",
    reference="Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions, "
    "eq. 2, with the Gauss–Newton curvature of Martens 2020",
    curvature="gram",
    curvature_rows="link",
    function="inverse",
    scale="inverse_n",
)
