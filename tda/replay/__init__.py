"""Exact unrolling: the derivative of a recorded training run by the weight of every example.

>>> training = tda.Training(model=model, inputs=X, targets=y, batches=order)   # doctest: +SKIP
>>> training.run()                               # the trained model              # doctest: +SKIP
>>> training.influence(queries)                  # [query, train]                 # doctest: +SKIP

rules (one step of an optimiser, and its adjoint) + network (a model's losses) → training

It answers what would become of *this* run, with its initial weights and order of examples, if an
example counted a little more or less: nothing is assumed about convergence. It costs about two
trainings for the run and, for every query, a training with second derivatives.
"""

from __future__ import annotations

from tda.replay.training import Training

__all__ = ["Training"]
