"""RelatIF: influence for its price in change of the model."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="relatif",
    summary="Influence on the query per unit of change of the whole model: fewer outliers.",
    formula="mean_c (1/n) ∇ℓ_qᵀ (H + λI)⁻¹ ∇ℓ_i / ‖(H + λI)⁻¹ ∇ℓ_i‖, H = mean_i ℓ''(f_i) ∇f_i∇f_iᵀ",
    reference="Barshan et al. 2020, RelatIF: Identifying Explanatory Training Examples via "
    "Relative Influence, section 4 (θ-RelatIF)",
    curvature="gram",
    curvature_rows="link",
    function="inverse",
    normalize="train",
    norm="step",
    scale="inverse_n",
)
