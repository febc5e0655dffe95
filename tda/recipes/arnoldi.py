"""Influence function on the directions of largest curvature alone."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="arnoldi",
    summary="As influence, undamped, on the directions of largest curvature alone.",
    formula="mean_c (1/n) Σ_{j ≤ r} ⟨∇ℓ_q, v_j⟩⟨v_j, ∇ℓ_i⟩/σ_j, "
    "(σ_j, v_j) the r largest of H = mean_i ℓ''(f_i) ∇f_i∇f_iᵀ",
    reference="Schioppa et al. 2022, Scaling Up Influence Functions, section 3",
    curvature="gram",
    curvature_rows="link",
    function="inverse",
    damping=0.0,
    rank=100,
    scale="inverse_n",
)
