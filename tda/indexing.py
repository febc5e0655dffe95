"""Index: a training set featurized into a store, from the beginning or from where it was left."""

from __future__ import annotations

import platform
import sys
from collections.abc import Mapping
from functools import partial
from importlib.metadata import version
from typing import Any

from tda import __version__
from tda.bases import Fitted, fit_bases, read_bases
from tda.batch_size import BatchSize, check_batch_size
from tda.cluster import Cluster, working
from tda.curvature.table import check_measurement
from tda.data import Dataset, as_dataset
from tda.errors import ConfigError
from tda.examples import describe
from tda.featurizer import Featurizer
from tda.filling import Filling, filler
from tda.gradients import shapes_of
from tda.progress import progress_bar
from tda.projection import KINDS, Projection, Projector
from tda.run import Run
from tda.store import Store
from tda.store.encoding import Dtype
from tda.store.files import Place, as_place, stat_file
from tda.store.lock import sole_writer
from tda.task import Task, require_task
from tda.training.metric import check_projection
from tda.training.schedule import by_training

_CHUNK_BYTES = 8 * 2**20  # of rows: larger buffers page-fault on every read
_MAX_CHUNK_ROWS = 4096
# Of a number in a product; of int4 and ternary, which are unpacked, more than on the disk.
_ITEM_BYTES = {"bfloat16": 2, "float32": 4, "int8": 1, "int4": 2, "ternary": 2}
_OF_CHECKPOINTS = ("checkpoints", "bases")  # lists in a manifest
_VERSIONS = ("torch", "numpy", "zarr")


def index(
    task: Task,
    dataset: Any,
    path: str | Place,
    *,
    proj_dim: int = 2048,
    projection: str | Projection = "count_sketch",
    seed: int = 0,
    dtype: Dtype = "bfloat16",
    batch_size: BatchSize = "auto",
    chunk_rows: int | None = None,
    gauss_newton: bool = False,
    workers: int | str | Cluster | None = None,
    progress: bool = True,
) -> Run:
    """Featurize a training set at every checkpoint of a task into the store at ``path``.

    dataset: map-style, or arrays (see `tda.data`); read from a second thread. projection: a kind
    (``proj_dim`` and ``seed`` go with it) or a `Projection`. dtype: of the stored rows, 32, 16, 8,
    4½ or 1.8 bits a number (`tda.store.encoding`). batch_size: examples computed at once
    (`tda.batch_size`). chunk_rows: rows written at once, by default 8 MiB. gauss_newton: also
    `Run.add_curvature`, for recipe "influence_gn". workers: so many processes, the address of a
    Dask scheduler, or a `Cluster`; the store is the same.

    The same call resumes an interrupted run, and does nothing where it is complete. With more
    examples at the end of the data, or more checkpoints at the end of the list, it computes those.
    Raises MismatchError where the store was made with something else; nothing is overwritten.
    """
    if isinstance(projection, str):
        projection = Projection(projection, proj_dim, seed)
    if not isinstance(projection, Projection):
        raise ConfigError(
            "this is no projection",
            found=repr(projection),
            wanted=f"a tda.Projection, or {' | '.join(KINDS)}",
        )
    check_batch_size(batch_size)
    if dtype not in _ITEM_BYTES:
        raise ConfigError(f"unknown dtype {dtype!r}", wanted=", ".join(_ITEM_BYTES))
    require_task(task, "tda.index(tda.Task(model, checkpoints=[…]), dataset, path)")
    if gauss_newton:
        check_measurement(task.measurement)
    path, data = as_place(path), as_dataset(dataset)
    with working(workers, progress):
        with progress_bar("reading the data", len(data), progress) as tick:
            examples = describe(data, tick)
        with sole_writer(path):
            run = _open_or_create(
                task, data, path, projection, dtype, chunk_rows, batch_size, progress
            )
            run._plan("train", examples, data)
            if progress and run.featurizer().audit is not None:
                print(run.featurizer().audit, file=sys.stderr)
            Filling(run, "train", filler, data, batch_size).finish("indexing", progress)
        if gauss_newton:
            run.add_curvature(data, batch_size=batch_size, progress=progress)
    return run


def _open_or_create(
    task: Task,
    data: Dataset,
    path: Place,
    projection: Projection,
    dtype: str,
    chunk_rows: int | None,
    batch_size: BatchSize,
    progress: bool,
) -> Run:
    shapes = shapes_of(task.model)
    stored = Store.open(path).manifest if stat_file(path / "manifest.json") else None
    featurizer = Featurizer(task)
    if task.metric != "euclidean":
        check_projection(task.metric, projection)
    if stored is None:
        probe = featurizer.probe(data)
        projection = projection.resolve(shapes, probe.rank_one, probe.filters)
    else:
        projection = projection.as_stored(shapes, stored["projection"])
    about, bases = task.manifest(), None
    if projection.needs_pilot:
        own, every = projection.kind == "eigenbasis", [range(len(task.checkpoints))]
        bases = fit_bases(
            path,
            read_bases(path, stored, task) if stored else None,
            by_training(about["checkpoints"]) if own else every,
            partial(featurizer.fit, projection, data, batch_size, progress),
        )
    projector = featurizer.bind(projection, bases)
    if chunk_rows is None:
        chunk_rows = stored["chunk_rows"] if stored else _chunk_rows(projector.dim, dtype)
    manifest = {
        **about,
        **_of_the_projection(projection, projector, bases),
        "dtype": dtype,
        "chunk_rows": chunk_rows,
    }
    known = len((stored or manifest)["checkpoints"])
    run = Run(_grown(path, manifest, known, bases), task)
    run._featurizer = featurizer
    return run


def _of_the_projection(
    projection: Projection, projector: Projector, bases: Fitted | None
) -> dict[str, Any]:
    """The part of a manifest that says how rows are projected, and where their layers are."""
    spec = {**projection.spec(), "dim": projector.dim}
    layers = [{"name": n, "offset": o, "size": s} for n, o, s in projector.layers]
    found = {"projection": spec, **({"layers": layers} if layers else {})}
    if bases is None:
        return found
    spec["bases_digest"] = bases.first
    return found | bases.by_checkpoint


def _grown(path: Place, manifest: Mapping[str, Any], known: int, bases: Fitted | None) -> Store:
    """The store of a manifest, whose checkpoints but the ``known`` first are new to it."""
    of_known = {name: manifest[name][:known] for name in _OF_CHECKPOINTS if name in manifest}
    versions = {"tda": __version__, "python": platform.python_version()}
    versions |= {package: version(package) for package in _VERSIONS}
    store = Store.create(path, {"format": 1, **manifest, **of_known, "versions": versions})
    for place, checkpoint in enumerate(manifest["checkpoints"][known:], start=known):
        store.add_checkpoint(checkpoint, bases.digests[place] if bases is not None else None)
    return store


def _chunk_rows(dim: int, dtype: str) -> int:
    rows = _CHUNK_BYTES // (dim * _ITEM_BYTES[dtype])
    return max(1, min(rows, _MAX_CHUNK_ROWS))
