"""TracInCP: the loss reduction traced along training."""

from tda.recipe import Recipe

RECIPE = Recipe(
    name="tracin",
    summary="Sums, over checkpoints saved along training, the steps taken on the example.",
    formula="Σ_c η_c ⟨∇ℓ_q, ∇ℓ_i⟩",
    reference="Pruthi et al. 2020, Estimating Training Data Influence by Tracing Gradient "
    "Descent, section 3.2 (TracInCP)",
    checkpoint_weight="learning_rate",
)
