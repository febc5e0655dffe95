"""DataInf: the mean of the inverses in place of the inverse of the mean."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="datainf",
    summary="As influence, with the inverse and the mean over examples exchanged: a closed form.",
    formula="mean_c (1/n) Σ_layer ∇ℓ_qᵀ [mean_j (∇ℓ_j∇ℓ_jᵀ + λI)⁻¹] ∇ℓ_i, λ of each layer",
    reference="Kwon et al. 2024, DataInf: Efficiently Estimating Data Influence in LoRA-tuned LLMs "
    "and Diffusion Models, eq. 5",
    curvature="gram",
    curvature_rows="loss",
    blocks="layer",
    function="mean_of_inverses",
    damping=0.1,
    scale="inverse_n",
)
