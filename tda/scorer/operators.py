"""F of every checkpoint under a recipe: which rows make its curvature, with what damping.

Checkpoints that share a curvature form a group: each its own – unless training is unrolled, when a
segment's do, and what comes after a segment follows it in a chain.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from math import prod
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from tda.cache import Arrays, Cache, fingerprint
from tda.curvature import Diagonal, Gram, Moment, Part, Picked, second_moments, squared_norms
from tda.curvature.updating import About, updated
from tda.measurements import has_link
from tda.preconditioner import (
    Block,
    Operator,
    SpectralFunction,
    Spectrum,
    above,
    complement,
    decay,
    decompose,
    elapsed,
    identity,
    inverse,
    nothing,
    nowhere,
    require_curvature,
    require_invertible,
)
from tda.recipe import Recipe
from tda.recipe.requirements import curvature_table, layer_slices, require_rows, segments
from tda.scorer.row_weights import curvature_weights
from tda.store import Remaining, Table
from tda.store.files import beside
from tda.training.schedule import implied_damping

if TYPE_CHECKING:
    from tda.store import Store

Group = tuple[int, ...]


@dataclass(frozen=True)
class Operators:
    """The curvatures of a recipe on a run, and on the queries it may take them from.

    Raises RecipeError if the run lacks what the recipe needs, StoreError if it is unfinished.
    """

    recipe: Recipe
    manifest: dict[str, Any]
    train: Table
    rows: Table  # whose second moment H is
    queries: Table
    cache: Cache
    _held: dict[Group, Operator] = field(default_factory=dict, compare=False, repr=False)

    @staticmethod
    def of(store: Store, recipe: Recipe, queries: Table | None = None) -> Operators:
        """Without queries the training set is its own query set."""
        require_rows(store.manifest, recipe)
        train = store.table("train")
        train.require_complete()
        queries = train if queries is None else queries
        queries.require_complete()
        rows = train
        if recipe.curvature_rows == "gauss_newton" and recipe.curvature != "identity":
            rows = curvature_table(store, recipe)
        names = {train.name, rows.name, *([queries.name] if recipe.query_share else [])}
        sources = [fingerprint(store, name) for name in sorted(names)]
        known = [source for source in sources if source is not None]
        source = "+".join(known) if len(known) == len(sources) else None
        cache = Cache(beside(store.path) / "cache", source)
        return Operators(recipe, store.manifest, train, rows, queries, cache)

    @property
    def unrolled(self) -> bool:
        return self.recipe.function == "unrolled"

    @cached_property
    def times(self) -> dict[Group, float]:
        """τ of the segments of training, for a recipe that unrolls it."""
        return segments(self.manifest, self.recipe)

    @cached_property
    def groups(self) -> list[Group]:
        """Checkpoints by shared curvature, in order."""
        count = len(self.manifest["checkpoints"])
        return list(self.times) if self.unrolled else [(c,) for c in range(count)]

    @cached_property
    def columns(self) -> list[slice]:
        """The blocks of H."""
        if self.recipe.blocks == "layer":
            return list(layer_slices(self.manifest, self.recipe).values())
        return [slice(0, self.train.dim)]

    def at(self, group: Group) -> Operator:
        """F of the curvature of these checkpoints."""
        if group not in self._held:
            if not self.unrolled:  # segments are used again by all before them
                self._held.clear()
            self._held[group] = self._make(group)
        return self._held[group]

    def chain(self, group: Group) -> list[Operator]:
        """What a query goes through for these checkpoints, in this order."""
        later = [g for g in self.groups if g > group] if self.unrolled else []
        decays = [self.at(g).with_functions(partial(_decay, self.times[g])) for g in later[::-1]]
        return [*decays, self.at(group)]

    def _make(self, group: Group) -> Operator:
        if self.recipe.curvature == "identity":
            return Operator((Block(self.columns[0], nothing(self.train.dim), identity),))
        where = f"recipe {self.recipe.name!r}, checkpoint {group[0]}"
        inverses = self.recipe.function == "mean_of_inverses"
        spectra, dampings = (self._inverses if inverses else self._spectra)(group, where)
        blocks = (
            Block(columns, spectrum, self._function(group, spectrum, damping, where), damping)
            for columns, spectrum, damping in zip(self.columns, spectra, dampings, strict=True)
        )
        return Operator(tuple(blocks))

    def _function(
        self, group: Group, spectrum: Spectrum, damping: float, where: str
    ) -> SpectralFunction:
        if self.unrolled:
            return elapsed(self.times[group], damping)
        if spectrum.trace == 0 and damping == 0:  # a layer without gradients has no influence
            return nowhere
        if self.recipe.function == "mean_of_inverses":
            return complement(damping)
        if self.recipe.rank is not None:
            return above(spectrum.cut(self.recipe.rank), inverse(damping))
        require_invertible(spectrum, damping, where)
        return inverse(damping)

    def _spectra(self, group: Group, where: str) -> tuple[list[Spectrum], list[float]]:
        """H and λ of every block. One decomposition serves every function and every damping."""
        recipe = self.recipe
        which = (group, recipe.curvature, recipe.curvature_rows, recipe.blocks)
        choices = (*which, recipe.shrinkage, recipe.core, recipe.query_share)

        def compute() -> Arrays:
            return _packed(self._decompose(self._parts(group), updating=self._keeps))

        arrays = self.cache.get("spectrum", choices, compute)
        spectra = _unpacked(arrays, len(self.columns))
        return spectra, self._dampings(group, [s.trace for s in spectra], where)

    def _inverses(self, group: Group, where: str) -> tuple[list[Spectrum], list[float]]:
        """M and λ of every block: mean_i (h_i x_i x_iᵀ + λI)⁻¹ = (I − M)/λ with
        M = mean_i h_i/(λ + h_i‖x_i‖²) x_i x_iᵀ."""
        recipe = self.recipe
        choices = (group, recipe.curvature_rows, recipe.blocks, recipe.query_share, recipe.damping)

        def compute() -> Arrays:
            parts = self._parts(group)
            squares = [
                part.weights[:, None] * squared_norms(part.table, part.checkpoint, self.columns)
                for part, _ in parts
            ]
            each = zip(parts, squares, strict=True)
            traces = torch.stack([share * x.sum(0) for (_, share), x in each]).sum(0)
            dampings = torch.tensor(self._dampings(group, traces.tolist(), where)).double()
            least = torch.where(dampings > 0, dampings, 1)  # 0: a layer without gradients
            terms = [
                (replace(part, weights=part.weights[:, None] / (least + x)), share)
                for (part, share), x in zip(parts, squares, strict=True)
            ]
            return {**_packed(self._decompose(terms)), "dampings": dampings.numpy()}

        arrays = self.cache.get("inverses", choices, compute)
        return _unpacked(arrays, len(self.columns)), arrays["dampings"].tolist()

    def _parts(self, group: Group) -> list[tuple[Part, float]]:
        """The rows h·x xᵀ that make H, and the share in it of each: 1/n, or that of the queries."""
        recipe, found = self.recipe, []
        mixed = ((self.rows, 1 - recipe.query_share), (self.queries, recipe.query_share))
        for table, share in mixed:
            if share:
                weights = self._weigh(table, recipe.curvature_rows)
                each = share / table.num_rows / len(group)
                found += [(Part(table, c, weights[c]), each) for c in group]
        return found

    @property
    def _keeps(self) -> bool:
        """Whether sums over the rows outlast a change of these."""
        tables = (self.rows, self.queries)
        return self.cache.source is not None and all(
            isinstance(t, Table | Remaining) for t in tables
        )

    def _decompose(
        self, parts: list[tuple[Part, float]], *, updating: bool = False
    ) -> list[Spectrum]:
        recipe = self.recipe
        moments = partial(self._moments, parts, updating)
        whole, share, core = recipe.curvature == "gram", recipe.shrinkage, recipe.core
        inside: Tensor | None = None
        if core is not None and core < self.train.dim:
            (moment,) = moments(self.columns, whole=False)
            assert isinstance(moment, Diagonal)
            axes = moment.mean()
            inside = axes.topk(core).indices.sort().values
        columns = self.columns if inside is None else [slice(0, len(inside))]
        found = moments(columns, whole=whole, dual=not share, inside=inside)
        if share:
            found = [m.shrunk(share) if isinstance(m, Gram) else m for m in found]
        spectra = [replace(decompose(m), count=self.train.num_rows) for m in found]
        return spectra if inside is None else [spectra[0].with_axes(axes, inside)]

    def _moments(
        self,
        parts: list[tuple[Part, float]],
        updating: bool,
        columns: list[slice],
        *,
        whole: bool,
        dual: bool = True,
        inside: Tensor | None = None,
    ) -> list[Moment]:
        """Σ share·h x xᵀ over all parts, as a mean over their rows; on the coordinates inside."""
        count = sum(part.table.num_rows for part, _ in parts)
        if not updating or (whole and dual and any(count < c.stop - c.start for c in columns)):
            terms = [replace(part, weights=part.weights * (share * count)) for part, share in parts]
            if inside is not None:
                terms = [replace(term, table=Picked(term.table, inside)) for term in terms]
            return second_moments(terms, columns, whole=whole, dual=dual)
        blocks = tuple((c.start, c.stop) for c in columns)
        picked = () if inside is None else tuple(inside.tolist())
        found = []
        for part, share in parts:
            table: Any = part.table
            kind = self.recipe.curvature_rows
            about = About(table.name, part.checkpoint, kind, blocks, whole, picked)
            sums = updated(self.cache.folder, about, table, self._weigh)
            found.append([each.scaled(share * count) for each in sums])
        return [
            functools.reduce(lambda a, b: a.merge(b), each) for each in zip(*found, strict=True)
        ]

    def _weigh(self, table: Table, rows: str) -> Tensor:
        has_margin = bool(self.manifest["measurement"]["has_margin"])
        return curvature_weights(table, rows, has_margin)

    def _dampings(self, group: Group, traces: list[float], where: str) -> list[float]:
        """λ of every block, in units of its eigenvalues."""
        require_curvature(sum(traces), where)
        recipe = self.recipe
        if recipe.damping == "auto" and self.unrolled:
            known = self.manifest["checkpoints"][group[-1]].get("weight_decay")
            return [known or 0.0] * len(traces)
        each, n = zip(traces, self._sizes(), strict=True), self.train.num_rows
        implied = self._implied_damping(group[-1])
        return [recipe.absolute_damping(trace, size, n, implied) for trace, size in each]

    def _sizes(self) -> list[int]:
        """The dimensions of every block: of the parameters, where rows hold only the coordinates
        of the largest eigenvalues, and else of the rows."""
        shapes = self.manifest.get("model", {}).get("parameters")
        if self.manifest["projection"]["kind"] != "eigenbasis" or not shapes:
            return [columns.stop - columns.start for columns in self.columns]
        if self.recipe.blocks == "whole":
            return [sum(map(prod, shapes.values()))]
        return [prod(shapes[name]) for name in layer_slices(self.manifest, self.recipe)]

    def _implied_damping(self, checkpoint: int) -> float | None:
        """λ by the schedule, where H is Gauss–Newton and in the metric of the optimiser."""
        checkpoints, metric = self.manifest["checkpoints"], self.manifest.get("metric", "euclidean")
        if not self.recipe.implies_damping:
            return None
        if self.recipe.curvature_rows == "link" and not has_link(self.manifest["measurement"]):
            return None  # an empirical Fisher, whose scale falls with the loss
        adam = checkpoints[checkpoint].get("optimizer") == "adam"
        if metric != ("adam" if adam else "euclidean"):
            return None
        return implied_damping(checkpoints, checkpoint)


def _decay(time: float, block: Block) -> SpectralFunction:
    return decay(time, block.damping)


def _packed(spectra: list[Spectrum]) -> Arrays:
    return {
        f"{block}.{name}": array
        for block, spectrum in enumerate(spectra)
        for name, array in spectrum.arrays().items()
    }


def _unpacked(arrays: Arrays, count: int) -> list[Spectrum]:
    parts: list[Arrays] = [{} for _ in range(count)]
    for key, array in arrays.items():
        block, _, name = key.partition(".")
        if name:
            parts[int(block)][name] = array
    return [Spectrum.from_arrays(part) for part in parts]
