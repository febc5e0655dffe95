"""Projections of per-example gradients to ``dim`` numbers: E[PᵀP] = I, or an eigenbasis.

    identity       P = I                                             the oracle of everything
    rademacher     P_ij = ±1/√dim, dense                             the oracle of the sketch
    count_sketch   P e_j = s(j)·e_{h(j)}, s random signs, h random   the default
    kronecker      P = ⊕_layer (L_layer ⊗ R_layer)                   keeps layers apart
    two_stage      count_sketch ∘ kronecker                          fast, best at small dim
    eigenbasis     the coordinates of largest curvature, in EK-FAC's basis      layers apart

The count sketch hashes whole runs of ``dim`` neighbouring coordinates: coordinate j goes to bucket
(j + shift(run of j)) mod dim. Two coordinates of one run never collide, any other two with
probability 1/dim, and every sign is independent, so it is unbiased with the variance of a count
sketch (Charikar et al. 2002; k·Var⟨Px,Py⟩ ≤ ‖x‖²‖y‖² + ⟨x,y⟩²), and adding a run is one
contiguous multiply-add. Gradients are formed tile by tile and sketched while they are in cache;
those of large layers with one position, which are outer products, are never formed at all.

    tiles.py      gradients in tiles; seeded randomness
    sketches.py   identity, rademacher, count sketch
    kernels.py    the count sketch of a tile in one launch, on a GPU
    outer.py      the count sketch of an outer product
    kronecker.py  pilot, bases, per-parameter blocks
    eigenbasis.py the coordinates that matter most, of all parameters together

Randomness is ``(seed, parameter name, role)`` hashed into Philox: the same bytes everywhere.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, Protocol

from torch import Tensor

from tda.errors import ConfigError
from tda.gradients import Factor
from tda.projection.eigenbasis import Eigen, Eigenbasis, largest
from tda.projection.kronecker import (
    Bases,
    Counts,
    Kronecker,
    Pilot,
    bases_from_bytes,
    bases_to_bytes,
)
from tda.projection.outer import rank_one
from tda.projection.sketches import CountSketch, Identity, Rademacher
from tda.projection.tiles import Shapes

__all__ = [
    "Bases", "Counts", "KINDS", "Pilot", "Projection", "Projector", "Shapes", "bases_from_bytes",
    "bases_to_bytes", "rank_one",
]  # fmt: skip

# A layer this many times larger than dim is sketched faster by three Fourier transforms.
_WORTH_TRANSFORMING = 8

_FOUND = ("rank_one", "ring", "filters")  # fields that come from looking at a few examples

KINDS = ("count_sketch", "two_stage", "kronecker", "eigenbasis", "rademacher", "identity")


@dataclass(frozen=True)
class Projection:
    """Which projection: a value that goes into the manifest.

    dim: numbers kept an example. seed: of all randomness. rank: rows of each side's basis, for
    two_stage. basis: "eigen" (of a pilot's second moments) or "random", for two_stage and
    kronecker. num_fit: most training examples that an eigenbasis is fitted on. rank_one, ring,
    filters: found by `resolve`, for count_sketch. Raises ConfigError.
    """

    kind: str = "count_sketch"
    dim: int = 2048
    seed: int = 0
    rank: int = 64
    basis: str = "eigen"
    rank_one: Sequence[str] = ()
    ring: int | None = None
    filters: Mapping[str, int] = field(default_factory=dict)
    num_fit: int = 4096

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            close = difflib.get_close_matches(str(self.kind), KINDS, n=1)
            raise ConfigError(
                f"unknown projection {self.kind!r}",
                wanted=", ".join(KINDS),
                do=f"did you mean {close[0]!r}?" if close else None,
            )
        if not isinstance(self.dim, int) or min(self.dim, self.rank, self.num_fit) < 1:
            raise ConfigError(
                "a projection needs a positive dimension",
                found=f"dim={self.dim!r}, rank={self.rank!r}, num_fit={self.num_fit!r}",
                wanted="integers ≥ 1",
            )
        if not isinstance(self.seed, int):
            raise ConfigError("the seed is no whole number", found=repr(self.seed))
        if self.basis not in ("eigen", "random"):
            raise ConfigError(f"unknown basis {self.basis!r}", wanted="eigen, random")

    @staticmethod
    def stored(spec: Mapping[str, Any]) -> Projection:
        """That of a manifest. Raises ConfigError where it has what this version does not know."""
        given = {name: value for name, value in spec.items() if name != "bases_digest"}
        unknown = given.keys() - {known.name for known in fields(Projection)}
        if unknown:
            raise ConfigError(
                "this run was made with a projection that this version does not know",
                where="manifest, projection",
                found=", ".join(sorted(unknown)),
                do="use the version of tda that made it (manifest, versions), or index again",
            )
        return Projection(**given)

    @property
    def needs_pilot(self) -> bool:
        """Whether gradients of a few examples must be seen before it is defined."""
        return self.kind in ("two_stage", "kronecker", "eigenbasis")

    def select(self, curvature: Mapping[str, Eigen], counts: Counts | None = None) -> Bases:
        """The bases of an eigenbasis: the ``dim`` coordinates of the largest curvature; or of each
        parameter as many as in ``counts``."""
        return largest(curvature, self.dim, counts)

    def fit(self, pilot: Pilot, shapes: Shapes, counts: Counts | None = None) -> Bases:
        """The bases this projection takes from a pilot's second moments; counts: the numbers that
        each parameter has, where ``dim`` has been shared out before."""
        if self.kind == "two_stage":
            counts = dict.fromkeys(shapes, self.rank**2)
        elif counts is None:
            counts = pilot.shares(self.dim, shapes)
        return pilot.bases(shapes, counts, self.basis == "random", self.seed)

    def spec(self) -> dict[str, Any]:
        """The fields that matter for this kind, for the manifest."""
        spec = asdict(self)
        if self.kind not in ("two_stage", "kronecker"):
            del spec["basis"]
        if self.kind != "eigenbasis":
            del spec["num_fit"]
        if self.kind != "two_stage":
            del spec["rank"]
        if self.kind == "identity":
            del spec["seed"]
        for found in _FOUND:
            if not spec[found]:
                del spec[found]
        return spec

    def resolve(
        self, shapes: Shapes, rank_one: Collection[str], filters: Mapping[str, int]
    ) -> Projection:
        """This projection for a model with these parameters.

        With ``dim`` ≥ their number there is nothing to project: identity. ``rank_one`` are those
        whose gradient at an example is an outer product: where they are large, a count sketch
        takes the sketch of an outer product, on rings that the shorter sides of all of them fit.
        ``filters`` are those of convolutions of many channels, with the size of their kernel:
        their patches are copied channels last.
        """
        _check_fit(shapes, rank_one, filters)
        sizes = {name: rows * columns for name, (rows, columns) in shapes.items()}
        number = sum(sizes.values())
        if self.kind == "identity" or (self.kind == "count_sketch" and self.dim >= number):
            return Projection("identity", number)
        if self.kind != "count_sketch":
            return self
        large = [name for name in rank_one if sizes[name] > _WORTH_TRANSFORMING * self.dim]
        ring = _ring(self.dim, max((min(shapes[name]) for name in large), default=self.dim))
        return replace(
            self,
            rank_one=sorted(large),
            ring=ring if ring < self.dim else None,
            filters=dict(filters),
        )

    def as_stored(self, shapes: Shapes, stored: Mapping[str, Any]) -> Projection:
        """The same, as it was resolved for the run whose manifest has ``stored``."""
        found = {name: stored[name] for name in _FOUND if name in stored}
        return replace(self.resolve(shapes, (), {}), **found)

    def bind(self, shapes: Shapes, bases: Bases | None = None) -> Projector:
        """The projection of a model's parameters; ``bases`` (of a `Pilot`) where it needs them.

        Raises ConfigError where what was found by `resolve` is not of such parameters.
        """
        _check_fit(shapes, self.rank_one, self.filters)
        ring = self.ring or self.dim
        for name in self.rank_one if ring != self.dim else ():
            if self.dim % ring or min(shapes[name]) > ring:
                raise _misfit(name, f"rings of {ring} of {self.dim} for {shapes[name]}")
        if self.kind == "identity":
            return Identity(shapes)
        if self.kind == "rademacher":
            return Rademacher(self.dim, self.seed, shapes)
        if self.kind == "count_sketch":
            return CountSketch(self.dim, self.seed, shapes, self.rank_one, self.filters, self.ring)
        if bases is None:
            raise ConfigError(f"projection {self.kind!r} needs the bases of a pilot")
        if self.kind == "eigenbasis":
            return Eigenbasis(bases)
        mixed = self.dim if self.kind == "two_stage" else None
        return Kronecker(bases, mixed, self.seed)


def _ring(dim: int, size: int) -> int:
    """The smallest divisor of ``dim`` that is not less than ``size``, or ``dim``."""
    return next((ring for ring in range(size, dim) if dim % ring == 0), dim)


def _check_fit(shapes: Shapes, rank_one: Collection[str], filters: Mapping[str, int]) -> None:
    """Raises ConfigError naming a parameter that is not there, or no filter of that kernel."""
    known = dict.fromkeys(rank_one, 1) | dict(filters)  # the kernel of a matrix is one
    for name, kernel in known.items():
        if name not in shapes or kernel < 1 or shapes[name][1] % kernel:
            absent = name not in shapes
            raise _misfit(
                name, "no such parameter" if absent else f"a kernel of {kernel} in {shapes[name]}"
            )


def _misfit(name: str, found: str) -> ConfigError:
    return ConfigError(
        "the projection is of another model",
        where=f"projection, parameter {name!r}",
        found=found,
        wanted="parameters of this model, kernels that divide their rows, rings that divide dim "
        "and hold the shorter sides",
        do="give the task that the run was made by",
    )


class Projector(Protocol):
    """A projection bound to a model: adds factors into a buffer, and reads rows out of it.

    ``layers`` are (name, offset, size) of blocks of the row; empty where layers are mixed.
    """

    dim: int
    layers: Sequence[tuple[str, int, int]]

    def zeros(self, num_examples: int) -> Any:
        """The buffer: something with a method ``to(device)``."""
        ...

    def add(self, buffer: Any, name: str, factors: list[Factor]) -> Tensor:
        """Add one parameter's gradient; returns its squared norm ``[example]``."""
        ...

    def rows(self, buffer: Any) -> Tensor:
        """``[example, dim]`` float32."""
        ...
