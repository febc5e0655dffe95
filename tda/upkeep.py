"""Is a run what it should be? Everything it holds is read, or a sample of it computed again.

verify   every byte against its checksum: tables, bases, ground truths, decisions
deep     rows drawn at random, computed again by the model, against those that are stored
repair   verify, then compute what is damaged, and nothing else
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from tda.batch_size import BatchSize
from tda.data import as_dataset, batches
from tda.decisions import Marks
from tda.errors import DataError
from tda.evaluate import record
from tda.examples import describe
from tda.store import Fault, Store
from tda.store.files import Place, list_folders

if TYPE_CHECKING:
    from tda.run import Run

SAMPLE = 64  # examples computed again at each checkpoint
# Of the largest number of a row: rounding of float32 sums in another order, and of the dtype. Of a
# ternary row's length: of a block's ‖x‖² is kept max_m m s_m², s_m the mean of its m largest.
# Most is lost where all m keep the same: Σ_{m=2}^{80} (√m − √(m−1))² = 1.09 times as much.
_ROUNDING = {"float32": 1e-4, "bfloat16": 2**-8 + 1e-4, "int8": 1 / 254 + 1e-4, "int4": 1 / 13}
_ROUNDING |= {"ternary": 1.09322**0.5 + 1e-4}
_COLUMN = 1e-3  # relative, of loss, p, slope, …


def verify(path: str | Place, *, withdraw: bool = True) -> list[Fault]:
    """Every fault of a run, sorted by path; an empty list: it is whole, as it was written.

    Marks of damaged chunks and retrainings are withdrawn (unless not ``withdraw``), so that the
    next `tda index` or `tda evaluate` does these again. Raises StoreError if there is no run.
    """
    store = Store.open(path)
    faults = store.verify(withdraw=withdraw)
    for name in list_folders(store.path / record.FOLDER):
        faults += record.faults(store.path, name, withdraw)
    decided = Marks(store.path).fault()
    if decided is not None:
        file, *said = decided
        faults.append(Fault(file, "altered", *said))
    return sorted(faults, key=lambda fault: (fault.path, fault.kind))


@dataclass(frozen=True)
class Difference:
    """An example whose stored numbers are not those the model gives now.

    error: largest |stored − computed| over largest |stored|, of the row or of the column ``where``;
    of a ternary row ‖stored − computed‖ / ‖stored‖.
    """

    id: str
    checkpoint: int
    where: str
    error: float
    allowed: float


def deep(
    run: Run, dataset: Any, sample: int = SAMPLE, seed: int = 0, batch_size: BatchSize = "auto"
) -> list[Difference]:
    """Compute a random sample of the training rows again and compare; needs the run's task.

    Checksums say that a run is as it was written; this says that it was written of this model and
    these data, by software that computes the same. Rows agree if no number differs by more than
    the rounding of the stored type, relative to the largest of its row; ternary rows by the length
    of the difference, relative to their own. Raises DataError if the data set has fewer examples.
    """
    data, table = as_dataset(dataset), run.store.stored("train")
    if len(data) < table.num_rows:
        raise DataError(
            "this data set is not the one the run was made with",
            where=table.folder,
            found=f"{len(data)} examples",
            wanted=f"at least {table.num_rows}",
            do="give the data set the run was indexed with last, deleted examples too",
        )
    draw = np.random.default_rng(seed)
    picked = np.sort(draw.choice(table.num_rows, min(sample, table.num_rows), replace=False))
    some = [data[int(i)] for i in picked]
    found = [
        Difference(str(id_), -1, "content of the example", 1.0, 0.0)
        for id_, same in zip(
            table.entries("id", picked),
            (describe(some).digests == table.entries("digest", picked)).all(1),
            strict=True,
        )
        if not same
    ]
    featurizer = run.featurizer()
    size = featurizer.batch_size(batch_size, data)
    for checkpoint in range(table.num_checkpoints):
        featurizer.at(checkpoint)
        columns = {name: table.column(name)[checkpoint] for name in ("loss", "p", "grad_norm")}
        collate = featurizer.task.collate
        for first, batch in batches(some, 0, len(some), size, collate):
            here = picked[first : first + size]
            features = featurizer(batch, len(here), train=True)
            rows = table.gather(checkpoint, here).numpy()
            pairs = {"row": (rows, features.rows.numpy())}
            for name, values in columns.items():
                pairs[name] = (values[here][:, None], features.columns[name].numpy()[:, None])
            found += _differences(table.entries("id", here), checkpoint, pairs, table.dtype)
    return found


def _differences(
    ids: np.ndarray, checkpoint: int, pairs: Mapping[str, tuple], dtype: str
) -> list[Difference]:
    found = []
    for where, (stored, computed) in pairs.items():
        allowed = _ROUNDING[dtype] if where == "row" else _COLUMN
        order = 2 if where == "row" and dtype == "ternary" else np.inf
        scale = np.maximum(np.linalg.norm(stored, order, axis=1), np.finfo(np.float32).tiny)
        if where != "row":
            scale = np.maximum(scale, 1e-3)  # a loss of almost nothing has no relative error
        error = np.linalg.norm(stored - computed, order, axis=1) / scale
        same = (error <= allowed) | (np.isnan(stored) & np.isnan(computed)).all(1)
        found += [
            Difference(str(ids[i]), checkpoint, where, float(error[i]), allowed)
            for i in np.flatnonzero(~same)
        ]
    return found


def meaning(differences: list[Difference], sample: int, num_checkpoints: int) -> str:
    """What differences say about where a run comes from."""
    if any(d.checkpoint < 0 for d in differences):
        return "other data: examples have another content than when they were indexed"
    rows = {(d.id, d.checkpoint) for d in differences}
    by_checkpoint = [sum(c == k for _, c in rows) for k in range(num_checkpoints)]
    if any(count == sample for count in by_checkpoint):
        which = ", ".join(str(c) for c, n in enumerate(by_checkpoint) if n == sample)
        return f"other weights, measurement or software: all rows of checkpoint {which} differ"
    return "some rows only: they were altered and sealed again, or computed by other software"
