"""Which models are trained again: the subsets of the training set, and their seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal, get_args

import numpy as np

from tda.errors import ConfigError

Kind = Literal["half", "removal", "leave_one_out", "given"]
_FRACTION = {"half": 0.5, "removal": 0.05}


@dataclass(frozen=True, kw_only=True)
class Design:
    """Subsets S_1 … S_m of the training set, each trained on once a seed.

    kind          half: random subsets; every retraining has a random stream of its own, so that
                  outputs differ by the subset *and* by the luck of training.
                  removal: random subsets, a few per cent left out, all trained with the same seed
                  (that of the model attributed, say): what remains is the subset.
                  leave_one_out: one example left out, the same seed.
                  given: what ``left_out`` says, the same seed.
    num_subsets   m; at most the number of examples for leave_one_out, which takes them in a random
                  order.
    fraction      share of the examples that is left out: half .5, removal .05 unless given.
    seeds         the retrainings of a subset; outputs are averaged over them.
    draw          seed of the subsets themselves. Subset s does not depend on num_subsets: a design
                  with more subsets or more seeds continues the one with fewer.

    Raises ConfigError naming the field.
    """

    kind: Kind = "half"
    num_subsets: int = 64
    fraction: float | None = None
    seeds: tuple[int, ...] = (0,)
    draw: int = 0
    left_out: tuple[tuple[int, ...], ...] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "seeds", tuple(self.seeds))
        if self.kind not in get_args(Kind):
            raise _wrong("kind", self.kind, " | ".join(get_args(Kind)))
        if self.num_subsets < 1:
            raise _wrong("num_subsets", self.num_subsets, "at least 1")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds) or min(self.seeds) < 0:
            raise _wrong("seeds", self.seeds, "at least one number ≥ 0, none twice")
        if self.kind in _FRACTION:
            if self.fraction is None:
                object.__setattr__(self, "fraction", _FRACTION[self.kind])
            if not 0 < self.fraction < 1:  # type: ignore[operator]
                raise _wrong("fraction", self.fraction, "a share between 0 and 1")
        elif self.fraction is not None:
            raise _wrong("fraction", self.fraction, f"none: {self.kind} says what is left out")
        if (self.kind == "given") != (self.left_out is not None):
            raise _wrong("left_out", self.left_out, "indices a subset, with kind='given' and only")

    @staticmethod
    def given(left_out: Sequence[Sequence[int]], seeds: Sequence[int] = (0,)) -> Design:
        """The subsets that leave out these examples, e.g. the highest ranked of some method."""
        sets = tuple(tuple(sorted(int(i) for i in some)) for some in left_out)
        return Design(kind="given", num_subsets=len(sets), seeds=tuple(seeds), left_out=sets)

    def masks(self, num_train: int) -> np.ndarray:
        """uint8 ``[subset, train]``: 1 where the example is trained on. Raises ConfigError."""
        masks = np.ones((self.num_subsets, num_train), np.uint8)
        for mask, some in zip(masks, self._left_out(num_train), strict=True):
            mask[some] = 0
        empty = np.flatnonzero(~masks.any(1))
        if len(empty):
            field = "fraction" if self.left_out is None else "left_out"
            raise _wrong(field, "everything", f"an example to train on in subset {empty[0]}")
        return masks

    def _left_out(self, num_train: int) -> list[np.ndarray]:
        if self.left_out is not None:
            sets = [np.array(some, np.int64) for some in self.left_out]
            if any(len(some) and not 0 <= some.min() <= some.max() < num_train for some in sets):
                raise _wrong("left_out", "an index outside", f"indices below {num_train}")
            return sets
        if self.kind == "leave_one_out":
            if self.num_subsets > num_train:
                raise _wrong("num_subsets", self.num_subsets, f"at most {num_train} examples")
            order = np.random.default_rng(self.draw).permutation(num_train)
            return list(order[: self.num_subsets, None])
        assert self.fraction is not None
        count = max(1, round(self.fraction * num_train))
        draws = [np.random.default_rng([self.draw, s]) for s in range(self.num_subsets)]
        return [draw.permutation(num_train)[:count] for draw in draws]

    def seed(self, subset: int, position: int) -> int:
        """What the retraining of ``subset`` with ``seeds[position]`` is seeded with."""
        given = self.seeds[position]
        if self.kind != "half":
            return given
        return int(np.random.SeedSequence([given, subset]).generate_state(1)[0])

    def spec(self) -> dict[str, Any]:
        """As JSON."""
        parts = asdict(self)
        sets = self.left_out
        return {
            **parts,
            "seeds": list(self.seeds),
            "left_out": None if sets is None else [list(some) for some in sets],
        }

    @staticmethod
    def parse(spec: dict[str, Any]) -> Design:
        """The design that :meth:`spec` described."""
        sets = spec["left_out"]
        left_out = None if sets is None else tuple(tuple(some) for some in sets)
        return Design(**{**spec, "seeds": tuple(spec["seeds"]), "left_out": left_out})


def _wrong(field: str, found: object, wanted: str) -> ConfigError:
    return ConfigError(
        f"the design of a ground truth has a wrong {field}",
        where=f"Design.{field}",
        found=repr(found),
        wanted=wanted,
    )
