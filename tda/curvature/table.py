"""The table ``curvature``: rows of which a weighted mean of squares is the Gauss–Newton matrix.

    G = (1/n) Σ_i Σ_c p_ic ∇ℓ_ic ∇ℓ_icᵀ = (1/n) Σ_i J_iᵀ (diag p_i − p_i p_iᵀ) J_i

over every label c of every training example i, each as probable as the model thinks it is. That is
many rows and nearly all of G is in few of them: a pair (i, c) adds in proportion to
a_ic = p_ic ‖e_c − p_i‖², which one forward pass tells. So pairs are drawn with probability
π_ic = min(1, τ a_ic), the largest for sure, and weighted by 1/π_ic (Horvitz and Thompson 1952):
any number of rows gives G without bias, and as many as there are pairs give it exactly.

    G ≈ (1/R) Σ_r h_r x_r x_rᵀ,    h_r = R/(n π_r) · p_r ℓ'(f_r)²    the column ``curvature``

With 4 rows a dimension, scores of influence damped by tr(G)/n had a rank correlation of .991 and
more with those of all pairs (digits, two networks of 9,610 parameters, projected to 512 and 2,048);
all labels of a random subsample of examples, as many rows, had .57 to .71 (at 512).

Other measurements draw targets from the model (`Measurement.draw`) in place of c.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from torch import Tensor

from tda.batch_size import BatchSize
from tda.curvature.sampling import (
    MOST_CLASSES,
    Sample,
    draw,
    generator_of,
    none_out_of_reach,
    pair_traces,
)
from tda.data import Batch, Dataset, Picked, batches, to
from tda.errors import MismatchError, StoreError, TaskError
from tda.examples import Examples, describe
from tda.featurizer import Features, Featurizer
from tda.filling import Filler, fill
from tda.gradients.exact import example_of
from tda.measurements import (
    Measurement,
    log_odds,
    predict,
    target,
    with_target,
)
from tda.progress import Tick
from tda.store import Store, Table
from tda.store.files import remove_tree
from tda.store.manifest import CURVATURE, TRAIN
from tda.store.marks import STATIC, remove_mark

ROWS_PER_DIMENSION = 4
_PROBES = 4


def check_measurement(measurement: Measurement) -> None:
    """Raises TaskError if the table has no meaning."""
    if measurement.draw is None:
        raise TaskError(
            f"the Gauss–Newton matrix of measurement {measurement.name!r} is not known",
            found="no likelihood: targets cannot be drawn from the model",
            wanted="a Measurement with `draw`, such as cross_entropy, multi_label or causal_lm",
            do="give the Measurement a `draw`, or use a recipe that needs no Gauss–Newton rows, "
            "such as influence",
        )


def plan_curvature(
    store: Store,
    featurizer: Featurizer,
    dataset: Dataset,
    num_rows: int | None,
    batch_size: BatchSize,
    tick: Tick,
) -> Table:
    """The table, with its rows chosen; ``missing()`` is left to compute.

    One that is there is kept, unless the training set has grown since or it has another number of
    rows than asked for: then it is made again. ``tick(examples)`` a batch of each checkpoint.
    Raises MismatchError if ``dataset`` is not the training set, TaskError.
    """
    check_measurement(featurizer.task.measurement)
    train = store.stored(TRAIN)  # deleted examples too: they may come back
    if len(dataset) != train.num_rows:
        raise _other_data(train, f"{len(dataset)} examples")
    wanted = ROWS_PER_DIMENSION * train.dim if num_rows is None else num_rows
    if wanted < 1:
        raise TaskError("a curvature table needs rows", found=f"num_rows = {wanted}", wanted="≥ 1")
    sample = _stored(store, train, num_rows)
    if sample is None:
        size = featurizer.batch_size(batch_size, dataset)
        sample = choose(featurizer, dataset, wanted, size, tick)
        if not _is_of(store, train, len(sample.example)):
            _remove(store)
    return store.plan(CURVATURE, _describe(sample, train, dataset), None)


def choose(
    featurizer: Featurizer, dataset: Dataset, num_rows: int, batch_size: int, tick: Tick
) -> Sample:
    """The rows, from a forward pass over the data at every checkpoint."""
    importance = _importance(featurizer, dataset, batch_size, tick)
    drawn = importance.shape[1] == 1
    if not drawn:
        return draw(importance, num_rows)
    num_draws = -(-num_rows // len(dataset))
    sample = draw(np.repeat(importance, num_draws, axis=1), num_rows)
    return replace(sample, weight=sample.weight / np.float32(num_draws), drawn=True)


@torch.no_grad()
def _importance(
    featurizer: Featurizer, dataset: Dataset, batch_size: int, tick: Tick
) -> np.ndarray:
    """a ``[example, label]``: shares of the pairs in tr(∇²ℓ) at the outputs, mean of checkpoints.

    ``[example, 1]`` where targets are drawn.
    """
    task, gradients, n = featurizer.task, featurizer.gradients, len(dataset)
    shares: list[np.ndarray] = []
    for checkpoint in range(len(task.checkpoints)):
        featurizer.at(checkpoint)
        parts = []
        for first, batch in batches(dataset, 0, n, batch_size, task.collate):
            last = min(first + batch_size, n)
            outputs = gradients.apply(predict, batch).float().cpu()
            if _has_every_label(task.measurement, outputs):
                parts.append(pair_traces(outputs.softmax(1)))
            else:
                parts.append(_traces(task.measurement, outputs, to(batch, "cpu"))[:, None])
            tick(last - first)
        a = torch.cat(parts).clamp(min=0)
        a[~a.isfinite()] = 0  # left to the featurizer, which names the example
        shares.append((a / a.sum(dtype=torch.float64).clamp(min=1e-300)).numpy())
    return none_out_of_reach(np.mean(shares, axis=0))


def _has_every_label(measurement: Measurement, outputs: Tensor) -> bool:
    return measurement.output is log_odds and outputs.shape[1] <= MOST_CLASSES


def _traces(measurement: Measurement, outputs: Tensor, batch: Batch) -> Tensor:
    """tr(∇²ℓ) ``[example]``, by vᵀ∇²ℓv of random signs v."""
    hessian = measurement.hessian
    if hessian is None:
        return torch.ones(len(outputs))
    generator = torch.Generator().manual_seed(0)
    total = torch.zeros(len(outputs))
    for _ in range(_PROBES):
        v = 2.0 * torch.randint(2, outputs.shape, generator=generator) - 1
        total += (v * hessian(outputs, batch, v)).flatten(1).sum(1)
    return total / _PROBES


def keep_sample(store: Store) -> Callable[[Table, Dataset], Examples] | None:
    """What the rows of the table, as it is, are of a training set in which examples have changed.

    None if the run has no whole table of its training set. Pairs (example, label) drawn with
    probabilities π give G without bias whatever has become of an example.
    """
    if CURVATURE not in store.manifest["data"]:
        return None
    sample = _stored(store, store.stored(TRAIN), None)
    if sample is None:
        return None
    return lambda train, dataset: _describe(sample, train, dataset)


def _is_of(store: Store, train: Table, num_rows: int) -> bool:
    """Whether the table, damaged as it may be, is so many rows of this training set."""
    data = store.manifest["data"]
    record = data.get(CURVATURE, {})
    whose = record.get("train") == data[TRAIN]["digest"]
    return whose and bool(record["num_rows"] == num_rows)


def _stored(store: Store, train: Table, num_rows: int | None) -> Sample | None:
    """The sample of the table as it is, unless it is to be made (again)."""
    data = store.manifest["data"]
    record = data.get(CURVATURE)
    if record is None or record["train"] != data[TRAIN]["digest"]:
        return None
    try:
        sample = _sample_of(store.stored(CURVATURE), train)
    except StoreError:  # damaged: the same rows are chosen again
        return None
    count = len(sample.example)
    # π = 1 of every pair: there are no more rows to be had.
    is_all = not sample.drawn and bool((sample.weight <= count / train.num_rows).all())
    asked = count if num_rows is None or (is_all and num_rows > count) else num_rows
    return sample if asked == count else None


def _sample_of(table: Table, train: Table) -> Sample:
    place = {name: i for i, name in enumerate(train.column("id"))}
    example = np.array([place[name] for name in table.column("example")])
    drawn = "draw" in table.columns()
    label = table.column("draw" if drawn else "label")
    return Sample(example, label, table.column("weight"), drawn)


def _remove(store: Store) -> None:
    folder = store.path / CURVATURE
    remove_mark(folder, STATIC)  # from here on it is no table
    remove_tree(folder)


def _describe(sample: Sample, train: Table, dataset: Dataset) -> Examples:
    """The rows as a table knows them. Raises MismatchError if the data are not the training set."""
    unique, where = np.unique(sample.example, return_inverse=True)
    digests = describe(Picked(dataset, unique)).digests
    different = (digests != train.column("digest")[unique]).any(axis=1)
    if different.any():
        raise _other_data(train, f"another content at row {unique[np.argmax(different)]}")
    names = train.column("id")[sample.example]
    kind = "draw" if sample.drawn else "label"
    ids = np.array([f"{name}/{label}" for name, label in zip(names, sample.label, strict=True)])
    columns = {kind: sample.label, "example": names, "weight": sample.weight}
    return Examples(ids, digests[where], columns)


def _other_data(train: Table, found: str) -> MismatchError:
    return MismatchError(
        "the curvature is that of the training set, and these are other data",
        where=train.folder,
        found=found,
        wanted=f"the {train.num_rows} examples of the training set",
        do="give the data set the run was indexed with",
    )


def curvature_filler(
    featurizer: Featurizer, table: Table, dataset: Dataset, batch_size: BatchSize
) -> Filler:
    """As `filler`; the rows' labels are put in. Raises MismatchError for another training set."""
    measurement, train = featurizer.task.measurement, Table(table.path, TRAIN)
    sample = _sample_of(table, train)
    labels, weight = torch.from_numpy(sample.label), torch.from_numpy(sample.weight)
    ids = table.column("id")

    def compute(batch: Batch, rows: np.ndarray) -> Features:
        if sample.drawn:
            batch = _drawn(featurizer, batch, ids[rows])
        else:
            given = target(batch)
            batch = with_target(batch, labels[rows].to(given).reshape(given.shape))
        features = featurizer(batch, len(rows))
        columns = features.columns
        h = weight[rows] * columns["slope"].square()
        if not sample.drawn:
            h *= columns["p"]
        elif measurement.draw_weight is not None:
            h *= measurement.draw_weight(batch)
        return replace(features, columns={**columns, "curvature": h})

    picked = Picked(dataset, sample.example)
    return partial(fill, featurizer, table, picked, batch_size, compute=compute)


def _drawn(featurizer: Featurizer, batch: Batch, ids: np.ndarray) -> Batch:
    """The batch with drawn targets. A draw depends on the row and the weights, on nothing else."""
    draw_one = featurizer.task.measurement.draw
    assert draw_one is not None, "plan_curvature checks this"
    targets = []
    for place, name in enumerate(ids):
        one = example_of(batch, place, len(ids))
        drawn = featurizer.gradients.apply(draw_one, one, generator_of(str(name)))
        targets.append(target(drawn).cpu())
    return with_target(batch, torch.cat(targets))
