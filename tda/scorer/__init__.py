"""Scores of training examples for queries, as streamed blocks of inner products.

    prepared.py   the whole method folded into the queries, and one number for every training row
    blocks.py     rows stream by and are multiplied: score[q, i] = Σ_c ⟨Q_c[q], ∇f_{i,c}⟩ · r[c, i]
    top.py        the k best and worst of every query, exactly (shortlist.py: by short products)
    candidates.py the same by FAISS, then scored exactly

``prepare`` folds a recipe by embedding.py (what F, norms and weights do to the queries),
operators.py (F of every checkpoint) and row_weights.py; what remains is the same whatever the
recipe. moments.py, signs.py and layer_weights.py ask more of what is prepared.
"""

from __future__ import annotations

from tda.scorer.blocks import ScoreMatrix, block, chunk_shape, scores, stream
from tda.scorer.prepared import Prepared, damping_used, prepare, self_influence
from tda.scorer.ranking import TopK
from tda.scorer.top import plain_top_k, top_k

__all__ = [
    "Prepared",
    "ScoreMatrix",
    "TopK",
    "block",
    "chunk_shape",
    "damping_used",
    "plain_top_k",
    "prepare",
    "scores",
    "self_influence",
    "stream",
    "top_k",
]
