"""Influence function with the Gauss–Newton curvature of all outputs."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="influence_gn",
    summary="As influence, with the curvature of every output and not the label's alone.",
    formula="mean_c (1/n) ∇ℓ_qᵀ (H + λI)⁻¹ ∇ℓ_i, H = mean_i Σ_y p_i(y) ∇ℓ_iy∇ℓ_iyᵀ",
    reference="Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions, "
    "eq. 2, with the Gauss–Newton curvature of Martens 2020, section 9",
    curvature="gram",
    curvature_rows="gauss_newton",
    function="inverse",
    scale="inverse_n",
)
