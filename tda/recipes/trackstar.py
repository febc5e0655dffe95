"""TrackStar: unit vectors after the curvature of training set and queries together."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="trackstar",
    summary="The angle between gradients, with what is common to all queries turned down.",
    formula="mean_c Σ_layer ⟨q, R⁻¹ t⟩ / (‖R^{−½}q‖ ‖R^{−½}t‖), R = s R_queries + (1−s) R_train, "
    "q and t = ∇ℓ/(√v + ε)",
    reference="Chang et al. 2025, Scalable Influence and Fact Tracing for Large Language Model "
    "Pretraining, section 3",
    curvature="gram",
    blocks="layer",
    query_share=0.9,
    function="inverse",
    normalize="both",
    metric="second_moment",
)
