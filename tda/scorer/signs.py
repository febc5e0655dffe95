"""Does the sign of a single score survive, of one query and one training example?

A pair is called reliable where its score has the same sign in every replicate – in each training,
or at each checkpoint of the only one – and in both halves of a projection whose dimensions are
exchangeable. Where nothing repeats, nothing is known. It is a screen and no test: of scores that
are noise, one in 2^(R−1) passes R replicates, and half of those two halves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from tda.recipe import Recipe
from tda.scorer.prepared import Prepared
from tda.scorer.replicates import num_parts, trainings

HELD = 2**22  # numbers of products held at a time


@dataclass(frozen=True)
class SignRule:
    """groups: the checkpoints of every replicate; independent: whether those are trainings of
    their own; halves: whether the projection's are looked at."""

    groups: tuple[tuple[int, ...], ...]
    independent: bool
    halves: bool

    @staticmethod
    def of(manifest: Any, recipe: Recipe) -> SignRule:
        groups, independent = trainings(manifest["checkpoints"], recipe)
        return SignRule(tuple(map(tuple, groups)), independent, num_parts(manifest, recipe) > 1)

    @property
    def tells(self) -> bool:
        """Whether anything repeats."""
        return len(self.groups) > 1 or self.halves

    @property
    def says(self) -> str:
        """What a reliable pair has passed."""
        kind = "trainings" if self.independent else "checkpoints of one training"
        passed = [f"all {len(self.groups)} {kind}"] if len(self.groups) > 1 else []
        passed += ["both halves of the projection"] if self.halves else []
        return f"its sign is the same in {' and '.join(passed)}" if passed else "nothing repeats"


def signs_survive(
    prepared: Prepared, rule: SignRule, queries: np.ndarray, rows: np.ndarray
) -> np.ndarray | None:
    """Of score[queries[p], rows[p]]: ``[p]`` bool; None where nothing repeats.

    Raises StoreError as a read does.
    """
    if not rule.tells:
        return None
    found = np.empty(len(rows), bool)
    size = max(1, HELD // prepared.train.dim)
    order = np.argsort(rows, kind="stable")  # neighbours lie in one chunk
    for start in range(0, len(rows), size):
        some = order[start : start + size]
        found[some] = _survive(prepared, rule, queries[some], rows[some])
    return found


def _survive(
    prepared: Prepared, rule: SignRule, queries: np.ndarray, rows: np.ndarray
) -> np.ndarray:
    replicates = torch.zeros(len(rule.groups), len(rows), dtype=torch.float64)
    halves = torch.zeros(2, len(rows), dtype=torch.float64)
    unique, place = np.unique(rows, return_inverse=True)
    for number, group in enumerate(rule.groups):
        for c in group:
            x = prepared.train.gather(c, unique).double()[place]
            products = prepared.queries[c][queries].double() * x
            weight = prepared.row_weights[c, rows].double()
            sides = torch.stack([products[:, half::2].sum(1) * weight for half in (0, 1)])
            replicates[number] += sides.sum(0)
            halves += sides
    parts = torch.cat([replicates, halves]) if rule.halves else replicates
    return ((parts > 0).all(0) | (parts < 0).all(0)).numpy()


@dataclass(frozen=True, eq=False)
class Signs:
    """Of a ranking: ``reliable [query, k]`` bool of either side, and the rule that they passed."""

    rule: SignRule
    proponents: np.ndarray
    opponents: np.ndarray


def signs_of(prepared: Prepared, manifest: Any, top: Any, rows: Any = None) -> Signs | None:
    """Which signs of a TopK survive; None where nothing repeats. rows: of the queries, else all."""
    rule = SignRule.of(manifest, prepared.recipe)
    if not rule.tells:
        return None
    sides = []
    for ranking in (top.proponents, top.opponents):
        indices = np.asarray(ranking.indices)
        which = np.arange(len(indices)) if rows is None else np.asarray(rows)
        pairs = np.repeat(which, indices.shape[1])
        found = signs_survive(prepared, rule, pairs, indices[which].ravel())
        assert found is not None
        side = np.zeros(indices.shape, bool)
        side[which] = found.reshape(len(which), -1)
        sides.append(side)
    return Signs(rule, sides[0], sides[1])
