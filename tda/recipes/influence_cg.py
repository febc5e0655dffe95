"""Influence function by conjugate gradients, without a projection."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="influence_cg",
    summary="As influence_gn, solved for every parameter of the model; needs the model.",
    formula="mean_c (1/n) ∇ℓ_qᵀ (H + λI)⁻¹ ∇ℓ_i, H = mean_i J_iᵀ (∇²ℓ_i) J_i of all outputs",
    reference="Koh and Liang 2017, Understanding Black-box Predictions via Influence Functions, "
    "section 3, with the Gauss–Newton products of Martens 2010",
    curvature="gram",
    curvature_rows="gauss_newton",
    function="inverse",
    scale="inverse_n",
    space="parameters",
)
