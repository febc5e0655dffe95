"""K-FAC and EK-FAC: a curvature factored over the two sides of every parameter.

A parameter is a matrix [O, I] whose gradient at an example is G = Σ_t l_t ⊗ r_t over the positions
t where it was used (`tda.gradients.factors`). Its block of the Fisher matrix F = E vec(G) vec(G)ᵀ
is taken as

    K-FAC    F ≈ L ⊗ R                          L = E Σ_t l_t l_tᵀ,  R = mean_t r_t r_tᵀ
    EK-FAC   F ≈ (U ⊗ V) diag(Λ) (U ⊗ V)ᵀ       U, V eigenvectors of L, R;  Λ = E (Uᵀ G V)²

K-FAC holds where the l_t are independent of the r_t and of other positions (Martens and Grosse
2015; convolutions: Grosse and Martens 2016; shared weights: the "expand" setting of Eschenhagen et
al. 2023). EK-FAC keeps its eigenvectors and takes the eigenvalues that are best for them, those of
the whole gradient: it is never farther from F in Frobenius norm (George et al. 2018). Parameters
are blocks of their own, biases too. E is the mean over examples.

G is the gradient of the loss with a target that is as probable as the model thinks it is, so that F
is the Fisher, or Gauss–Newton, matrix (``targets``). Where the likelihood is not known it is
that of the data's own targets, and ``EkFac.gauss_newton`` says so.

What takes no part does not count: a position whose l_t or r_t is zero (padding, a unit that is off)
adds nothing to F, so it is left out of R as well. A parameter that is used in several forms (a head
tied to an embedding) has one basis, of the sum of their factored curvatures.

    sums.py      K-FAC's moments and EK-FAC's eigenvalues, as sums that merge
    targets.py   whose gradients: examples with targets and weights
    fitting.py   both passes over a data set
"""

from __future__ import annotations

from tda.curvature.kfac.fitting import BATCH_SIZE, fit, fit_ekfac
from tda.curvature.kfac.sums import Block, Corrections, EkFac, Moments

__all__ = ["BATCH_SIZE", "Block", "Corrections", "EkFac", "Moments", "fit", "fit_ekfac"]
