"""Influence function with a Gauss–Newton curvature shrunk towards EK-FAC's."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="influence_shrunk",
    summary="Between influence_gn and influence_ekfac: what few examples say of a curvature, and "
    "what is certain of it.",
    formula="mean_c (1/n) ∇f_qᵀ (½H + ½diag(H) + λI)⁻¹ (−∇ℓ_i) in the eigenbasis of K-FAC, "
    "H = mean_i Σ_y p_i(y) ∇ℓ_iy∇ℓ_iyᵀ, diagonal beyond the 2,048 largest",
    reference="this engine: the shrinkage of Ledoit and Wolf 2004, eq. 1, with the diagonal of "
    "George et al. 2018 as its target; ½ is near the best on five tasks of the leaderboard",
    query="margin",
    curvature="gram",
    curvature_rows="gauss_newton",
    shrinkage=0.5,
    core=2048,
    function="inverse",
    scale="inverse_n",
    basis="eigen",
)
