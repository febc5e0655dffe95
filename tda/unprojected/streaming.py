"""Scores without a store or a projection: the queries stay in memory, the training set streams by.

    score[q, i] = scale · Σ_c w_c ⟨F(H_c) q_c, t_{i,c}⟩ / norms        as in `tda.recipe`

Queries are embedded in parameter space, m × P numbers, and preconditioned there. Then each training
gradient is computed once a checkpoint, for all queries together, and multiplied while it is in
cache. This is what a projection is measured against, and right for one question to a large model;
for more than one, index.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from tda.curvature import kfac
from tda.curvature.gauss_newton import GaussNewton
from tda.curvature.kfac import BATCH_SIZE, EkFac
from tda.data import Dataset, as_dataset, batches
from tda.errors import GradientError, TaskError
from tda.gradients import Factor, Gradients, Lookup, shapes_of
from tda.gradients.factors import materialise
from tda.progress import Tick, progress_bar
from tda.projection.outer import rank_one
from tda.projection.tiles import tiles
from tda.recipe import Recipe
from tda.recipe.requirements import checkpoint_weights, layer_alphas
from tda.recipes import get_recipe
from tda.scorer.embedding import reciprocal
from tda.task import Task, require_task
from tda.training.schedule import implied_damping
from tda.unprojected.preconditioners import Factored, Preconditioner, Solved, Unchanged, Vectors
from tda.unprojected.requirements import require_parameter_space

_TILE_FLOATS = 2**24


def attribute(
    task: Task,
    train: Any,
    queries: Any,
    recipe: str | Recipe = "influence_ekfac",
    *,
    damping: float | Literal["auto"] | None = None,
    ekfac: EkFac | Sequence[EkFac] | None = None,
    batch_size: int = BATCH_SIZE,
    seed: int = 0,
    progress: bool = True,
) -> np.ndarray:
    """Scores ``[query, train]`` float32, > 0 where training on the example helps; no projection.

    recipe: without curvature; or EK-FAC (curvature "diagonal" in basis "eigen"); or the whole
    Gauss–Newton matrix (curvature "gram"). damping: in place of the recipe's. ekfac: from
    `fit_ekfac`, one a checkpoint, in order; else fitted on all of ``train``, labels drawn by
    ``seed``. Training gradients are computed once a checkpoint, whatever the number of queries.

    Raises RecipeError for a recipe that has no meaning here, TaskError if the queries do not fit
    into memory, GradientError where a gradient is not finite.
    """
    require_task(task, "tda.attribute(tda.Task(model, checkpoints=[…]), train, queries)")
    chosen = get_recipe(recipe)
    if damping is not None:
        chosen = replace(chosen, damping=damping)
    require_parameter_space(task, chosen)
    data, manifest = (as_dataset(train), as_dataset(queries)), task.manifest()
    method = _Method(task, manifest, chosen, *data, batch_size)
    method.check_memory()
    curved = chosen.curvature != "identity"
    fitted = _given(ekfac, len(task.checkpoints)) if curved else None
    total = np.zeros((len(method.queries), len(method.train)))
    residuals = np.zeros(len(method.train))
    passes = len(task.checkpoints) * (len(method.queries) + len(method.train))
    if curved and fitted is None:
        passes += 2 * len(task.checkpoints) * len(method.train)
    with progress_bar(f"scores by {chosen.name}", passes, progress) as tick:
        for checkpoint, share in enumerate(checkpoint_weights(manifest, chosen)):
            curvature = None
            if curved:
                curvature = fitted[checkpoint] if fitted else method.fit(checkpoint, seed, tick)
            kernel, weights = method.products(checkpoint, curvature, tick)
            if chosen.combine == "product_of_means":
                total += share * kernel
                residuals += share * weights
            else:
                total += share * kernel * weights
    if chosen.combine == "product_of_means":
        total *= residuals
    if chosen.scale == "inverse_n":
        total /= len(method.train)
    return total.astype(np.float32)


@dataclass(frozen=True)
class _Method:
    """A recipe bound to a task and its data."""

    task: Task
    manifest: dict[str, Any]
    recipe: Recipe
    train: Dataset
    queries: Dataset
    batch_size: int

    def check_memory(self) -> None:
        """Raises TaskError if m × P float32 numbers are more than half of the memory."""
        size = 4 * sum(rows * width for rows, width in shapes_of(self.task.model).values())
        room = _memory(torch.device(self.task.device)) // 2
        if len(self.queries) * size > room:
            raise TaskError(
                "the queries' gradients do not fit into memory without a projection",
                found=f"{len(self.queries)} queries × {size / 2**30:.3g} GiB",
                wanted=f"at most half of the memory, {room / 2**30:.3g} GiB",
                do=f"ask for at most {room // size} queries at a time, or index with a projection "
                "and ask the run",
            )

    def fit(self, checkpoint: int, seed: int, tick: Tick) -> EkFac:
        data = self.train
        return kfac.fit(self.task, data, checkpoint, len(data), seed, self.batch_size, tick)

    def products(
        self, checkpoint: int, ekfac: EkFac | None, tick: Tick
    ) -> tuple[np.ndarray, np.ndarray]:
        """⟨F q, ∇f_i⟩ ``[query, train]`` and r_i ``[train]``, the rest of the training side."""
        task, recipe = self.task, self.recipe
        gradients = Gradients(task.model, task.measurement, task.device, task.autocast)
        gradients.load(task.weights(checkpoint))
        q = self.embed(gradients, tick)
        function = self.preconditioner(gradients, checkpoint, ekfac)
        out = folded = function.apply(q)
        if recipe.weighs_layers:
            weighted = {n: a for n, a in self.alphas.items() if n in out and a != 1}
            folded = {**out, **{n: alpha * out[n] for n, alpha in weighted.items()}}
        if recipe.normalize in ("query", "both"):
            folded = _divided(folded, _lengths(folded, out if recipe.norm == "step" else q))
        del q, out  # each is as large as the memory allows
        kernel, slope, norms = self.stream(gradients, folded, function, tick)
        weights = self.weights(slope, recipe.train)
        if recipe.normalize in ("train", "both"):
            weights = weights * reciprocal(norms * weights.abs())
        return kernel.double().numpy(), weights.numpy()

    @cached_property
    def alphas(self) -> dict[str, float]:
        """The weights of parameters' products; 1 for those not named."""
        return layer_alphas(self.manifest, self.recipe)

    def weights(self, slope: Tensor, gradient: str) -> Tensor:
        """w with w·∇f the wanted gradient, float64: −ℓ'(f), or 1 for a margin."""
        margin = gradient == "margin" and self.task.measurement.has_margin
        return torch.ones_like(slope).double() if margin else -slope.double()

    def preconditioner(
        self, gradients: Gradients, checkpoint: int, ekfac: EkFac | None
    ) -> Preconditioner:
        if ekfac is None:
            return Unchanged()
        recipe, where = self.recipe, f"recipe {self.recipe.name!r}, checkpoint {checkpoint}"
        record, implied = self.manifest["checkpoints"][checkpoint], None
        # The schedule of Adam is in another metric than these gradients.
        if record.get("optimizer") != "adam":
            implied = implied_damping(self.manifest["checkpoints"], checkpoint)
        if recipe.curvature == "diagonal":
            return Factored.of(ekfac, recipe, len(self.train), where)
        size, collate = self.batch_size, self.task.collate
        matrix = GaussNewton.of(gradients, self.train, batch_size=size, collate_with=collate)
        return Solved.of(matrix, ekfac, recipe, implied, where)

    def embed(self, gradients: Gradients, tick: Tick) -> Vectors:
        """q = w·∇f of every query."""
        m = len(self.queries)
        out = {
            name: torch.zeros(m, *shape, device=gradients.device)
            for name, shape in shapes_of(self.task.model).items()
        }
        for first, size, batch in self.batches(gradients, self.queries):

            def consume(name: str, factors: list[Factor], first: int = first) -> None:
                grad = materialise(factors)
                out[name][first : first + len(grad)] = grad

            link = gradients.link(gradients(batch, size, consume)[0], batch)
            weights = self.weights(link.slope, self.recipe.query).to(gradients.device)
            for values in out.values():
                values[first : first + size] *= weights[:, None, None].float()
            _check(link.loss, sum(v[first : first + size].sum((1, 2)) for v in out.values()), first)
            tick(size)
        return out

    def stream(
        self, gradients: Gradients, folded: Vectors, function: Preconditioner, tick: Tick
    ) -> tuple[Tensor, Tensor, Tensor]:
        """⟨F q, ∇f_i⟩ ``[query, train]``; ℓ'(f_i) and the lengths of ∇f_i ``[train]``."""
        n, device = len(self.train), gradients.device
        normalize = self.recipe.normalize in ("train", "both")
        kernel = torch.empty(len(self.queries), n)
        slope, norms = torch.empty(n), torch.empty(n, dtype=torch.float64)
        for first, size, batch in self.batches(gradients, self.train):
            part = torch.zeros(len(kernel), size, device=device)
            square = torch.zeros(size, dtype=torch.float64, device=device)

            def consume(
                name: str, factors: list[Factor], part: Tensor = part, square: Tensor = square
            ) -> None:
                for factor in factors:
                    part.add_(contract(folded[name], factor))
                if normalize:
                    own = function.squares(name, factors, self.recipe.norm == "step")
                    square.add_(own, alpha=self.alphas.get(name, 1.0))

            link = gradients.link(gradients(batch, size, consume)[0], batch)
            _check(link.loss, part.sum(0), first)
            span = slice(first, first + size)
            kernel[:, span], slope[span] = part.cpu(), link.slope
            norms[span] = square.sqrt().cpu()
            tick(size)
        return kernel, slope, norms

    def batches(self, gradients: Gradients, data: Dataset) -> Any:
        """(first example, number of examples, batch)."""
        count = len(data)
        for first, batch in batches(data, 0, count, self.batch_size, self.task.collate):
            size = min(self.batch_size, count - first)
            gradients.check(batch, range(first, first + size))
            yield first, size, batch


def contract(q: Tensor, factor: Factor) -> Tensor:
    """⟨q_a, G_b⟩ ``[m, example]`` of vectors q ``[m, O, I]`` and gradients G, the cheaper way."""
    m, _, width = q.shape
    outer = rank_one([factor])
    if outer is not None and m < width:  # G is not formed
        left, right = outer.left[:, 0, 0].float(), outer.right[:, 0, 0].float()
        return torch.einsum("mob,bo->mb", q @ right.T, left)
    out = q.new_zeros(m, factor.num_examples)
    if isinstance(factor, Lookup):
        index, value = factor.index.flatten(), factor.value.float()
        step = max(1, _TILE_FLOATS // max(1, value.numel()))
        for first in range(0, m, step):
            rows = q[first : first + step, index].unflatten(1, factor.index.shape)
            out[first : first + step] = torch.einsum("mbti,bti->mb", rows, value)
        return out
    flat = q.flatten(1)
    for tile in tiles([factor]):
        out += flat[:, tile.start : tile.start + tile.values.shape[1]] @ tile.values.float().T
    return out


def _given(ekfac: EkFac | Sequence[EkFac] | None, number: int) -> list[EkFac] | None:
    if ekfac is None:
        return None
    given = [ekfac] if isinstance(ekfac, EkFac) else list(ekfac)
    if len(given) != number:
        raise TaskError(
            "each checkpoint needs its own curvature",
            found=f"{len(given)} for {number} checkpoints",
            wanted="a list of tda.fit_ekfac(task, train, checkpoint), in order",
        )
    return given


def _check(loss: Tensor, sums: Any, first: int) -> None:
    bad = ~(torch.isfinite(loss) & torch.isfinite(sums.cpu()))
    if bad.any():
        raise GradientError(
            "the loss or the gradient of an example is not finite",
            where=f"example {first + int(bad.nonzero()[0])}",
            wanted="finite numbers",
            do="mend or leave out the example, or check the checkpoint",
        )


def _lengths(x: Vectors, y: Vectors) -> Tensor:
    """√⟨x, y⟩ ``[m]``, float64."""
    products = [(x[name].double() * y[name].double()).sum((1, 2)) for name in x]
    return torch.stack(products).sum(0).clamp(min=0).sqrt()


def _divided(x: Vectors, lengths: Tensor) -> Vectors:
    scale = reciprocal(lengths)[:, None, None]
    return {name: values * scale.to(values.dtype) for name, values in x.items()}


def _memory(device: torch.device) -> int:
    """Bytes the device has."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    sysconf: Callable[[str], int] | None = getattr(os, "sysconf", None)  # not on every system
    return sysconf("SC_PAGE_SIZE") * sysconf("SC_PHYS_PAGES") if sysconf else 16 * 2**30
