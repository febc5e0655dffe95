"""D-TRAK: the kernel of TRAK alone, for outputs other than the loss."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="d_trak",
    summary="Kernel regression on gradients of any output; in diffusion, the squared output.",
    formula="mean_c φ_q (ΦᵀΦ + nλI)⁻¹ φ_i, φ = ∇f of the measured output f",
    reference="Zheng et al. 2024, Intriguing Properties of Data Attribution on Diffusion Models, "
    "section 3",
    query="margin",
    train="margin",
    curvature="gram",
    curvature_rows="margin",
    function="inverse",
    scale="inverse_n",
)
