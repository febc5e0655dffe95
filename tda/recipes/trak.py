"""TRAK: attribution through the linearised margin, averaged over models."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="trak",
    summary="Kernel regression on margin gradients; made for averaging independent models.",
    formula="mean_c[φ_q (ΦᵀΦ + nλI)⁻¹ φ_i] · mean_c[1 − p_i], φ = ∇log(p/(1−p))",
    reference="Park et al. 2023, TRAK: Attributing Model Behavior at Scale, eq. 13 and 17",
    query="margin",
    train="loss",
    curvature="gram",
    curvature_rows="margin",
    function="inverse",
    combine="product_of_means",
    scale="inverse_n",
)
