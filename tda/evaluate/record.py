"""A ground truth on disk: RUN/evaluate/NAME, one completed unit for each (subset, seed).

    manifest.json           design, digests of data, queries, measurement and training function
    masks/                  [subset, train] uint8; train: those that were not deleted
    outputs/                [subset, seed, query] float32, NaN where it is not there yet
    done/static.json        mark of the layout and the masks
    done/SUBSET-SEED.json   mark of one retraining: its chunk of outputs is finished

Chunks, checksums and marks are those of the store (``tda.store``); a missing mark is work to do.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tda.errors import ConfigError, DataError, MismatchError, StoreError
from tda.evaluate.design import Design
from tda.store.arrays import ArraySpec, group_document
from tda.store.bounds import DOCUMENT_BYTES, MOST
from tda.store.deleted import deleted_positions, num_deleted
from tda.store.files import (
    TRAILER,
    Place,
    as_place,
    list_files,
    map_file,
    read_file,
    seal,
    stat_file,
    unseal,
    write_file,
)
from tda.store.manifest import config_hash, entries_of
from tda.store.marks import (
    STATIC,
    Mark,
    damage,
    put_marked,
    read_mark,
    remove_mark,
    write_chunks,
    write_documents,
    write_mark,
)
from tda.store.verify import Fault, FolderCheck

FOLDER = "evaluate"
_MANIFEST = "manifest.json"
_DERIVED = ("results.json", "plan.json")  # made of it; nothing relies on them
_REDO = "call ground_truth, or `tda evaluate CONFIG`, again: only what is missing is trained again"
_GROWS = ("num_subsets", "seeds")  # a design with more of these continues the one with fewer
_MASK_ROWS = 64
_MOST_UNITS = 2**20
_MASK_BYTES = 16 * 2**20  # of a chunk
_CURES = {
    "design": "give this design another name",
    "train": "the training set has changed: give this ground truth another name",
    "queries": "use the same queries, or give this ground truth another name",
}


@dataclass(frozen=True, eq=False)
class GroundTruth:
    """What retraining showed.

    masks ``[subset, train]`` uint8: 1 where an example was trained on, of those in the run's ids.
    outputs ``[subset, seed,
    query]`` float32, higher is better for the query: the margin f, or −loss where there is none.
    """

    masks: np.ndarray
    outputs: np.ndarray
    path: Place | None = None
    manifest: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        masks, outputs = np.asarray(self.masks), np.asarray(self.outputs)
        if masks.ndim != 2 or outputs.ndim != 3 or len(masks) != len(outputs):
            raise DataError(
                "masks and outputs are not of one ground truth",
                found=f"masks {list(masks.shape)}, outputs {list(outputs.shape)}",
                wanted="masks [subset, train], outputs [subset, seed, query]",
            )

    def __repr__(self) -> str:
        subsets, seeds, queries = self.outputs.shape
        return f"GroundTruth({subsets} subsets × {seeds} seeds, {queries} queries)"

    @property
    def mean(self) -> np.ndarray:
        """Outputs averaged over seeds ``[subset, query]`` float64."""
        return np.asarray(self.outputs, np.float64).mean(1)

    @staticmethod
    def open(path: str | Place) -> GroundTruth:
        """The ground truth in a folder. Raises StoreError if there is none or it is unfinished."""
        folder = as_place(path)
        manifest = _read_manifest(folder)
        return Record(folder, manifest, Design.parse(manifest["design"])).read()


@dataclass(frozen=True)
class Record:
    """The folder of a ground truth, seen through a design: subsets and seeds of that design."""

    path: Place
    manifest: Mapping[str, Any]
    design: Design

    @staticmethod
    def create(path: Place, design: Design, made_of: Mapping[str, Any]) -> Record:
        """Make the folder, or find it there made of the same, and lay out what the design adds.

        ``made_of``: train and queries (num_rows, digest), measurement, train_function.
        Raises MismatchError naming the first field that differs, ConfigError for a wrong design.
        """
        wanted = {"format": 1, "design": design.spec(), **made_of}
        if stat_file(path / _MANIFEST) is not None:
            stored = _read_manifest(path)
            wanted["design"] = _continued(path, stored, wanted)
        record = Record(path, wanted, design)
        full = Design.parse(wanted["design"])
        masks = full.masks(record._num_train)
        write_file(path / _MANIFEST, seal(wanted))
        record._lay_out(masks)
        return record

    @cached_property
    def _examples(self) -> np.ndarray:
        """int64 indices, in the training set, of the examples that are not deleted."""
        train = self.manifest["train"]
        deleted = deleted_positions({"data": {"train": train}}, self.path)
        return np.delete(np.arange(train["num_rows"]), deleted)

    @property
    def _num_train(self) -> int:
        train = self.manifest["train"]
        return int(train["num_rows"]) - num_deleted({"data": {"train": train}}, self.path)

    @property
    def num_queries(self) -> int:
        return int(self.manifest["queries"]["num_rows"])

    @cached_property
    def _specs(self) -> dict[str, ArraySpec]:
        """The arrays, with room for all that was ever asked for."""
        full, n, m = Design.parse(self.manifest["design"]), self._num_train, self.num_queries
        shape = (full.num_subsets, len(full.seeds), m)
        axes = ("subset", "seed", "query")
        return {
            "masks": ArraySpec(
                "masks", (full.num_subsets, n), (_mask_rows(n), n), "uint8", ("subset", "train")
            ),
            "outputs": ArraySpec("outputs", shape, (1, 1, m), "float32", axes),
        }

    @cached_property
    def _config(self) -> str:
        """Hash of all that determines the outputs of a unit, but the unit."""
        fixed = {k: v for k, v in self.manifest["design"].items() if k not in _GROWS}
        return config_hash(entries_of({**self.manifest, "design": fixed}))

    def _lay_out(self, masks: np.ndarray) -> None:
        documents = {spec.document_key: spec.document() for spec in self._specs.values()}
        entries = write_documents(self.path, {"zarr.json": group_document(), **documents})
        spec = self._specs["masks"]
        rows = spec.chunk_rows
        blocks = range(0, len(masks), rows)
        chunks = [(spec.key(s // rows), spec.pack(masks[s : s + rows])) for s in blocks]
        entries |= write_chunks(self.path, chunks)
        mark = Mark((0, len(masks)), self._config, entries)
        if read_mark(self.path / STATIC) != mark:
            remove_mark(self.path, STATIC)
            write_mark(self.path, STATIC, mark)

    def mask_fault(self) -> str | None:
        """What is wrong with the stored masks, or None; they are as large as the design says."""
        spec, mark = self._specs["masks"], read_mark(self.path / STATIC)
        if mark is None:
            return "their mark is missing or damaged"
        wanted = range(-(-spec.shape[0] // spec.chunk_rows))
        for key in map(spec.key, wanted):
            stat, size = stat_file(self.path / key), spec.num_bytes + TRAILER
            if stat is None or stat.size != size or key not in mark.files:
                return f"{key} is missing, or not of {size} bytes"
        return None

    def has_masks(self) -> bool:
        """Whether the masks on the disk are those of the design."""
        full = Design.parse(self.manifest["design"])
        masks, spec = full.masks(self._num_train), self._specs["masks"]
        rows = spec.chunk_rows
        for chunk in range(-(-len(masks) // rows)):
            data = map_file(self.path / spec.key(chunk))
            part = masks[chunk * rows : (chunk + 1) * rows]
            if data is None or not np.array_equal(spec.unpack(data[:-TRAILER])[: len(part)], part):
                return False
        return True

    def units(self) -> list[tuple[int, int]]:
        """(subset, position of the seed) of every retraining."""
        return [(s, k) for s in range(self.design.num_subsets) for k in range(self._num_seeds)]

    @property
    def _num_seeds(self) -> int:
        return len(self.design.seeds)

    def missing(self, units: Iterable[tuple[int, int]] | None = None) -> list[tuple[int, int]]:
        """The units (of these) without a mark, and those whose outputs are not what was marked."""
        if units is None:
            listed = list_files(self.path / "done")
            return [u for u in self.units() if _name(*u) not in listed or self._outputs(*u) is None]
        return [unit for unit in units if self._outputs(*unit) is None]

    def subset(self, subset: int) -> np.ndarray:
        """int64 indices, in the training set, of the examples of a subset, ascending."""
        return self._examples[np.flatnonzero(self._masks[subset])]

    @cached_property
    def _masks(self) -> np.ndarray:
        return self.design.masks(self._num_train)

    def _outputs(self, subset: int, seed: int) -> np.ndarray | None:
        """``[query]`` of a retraining, or None where it is not finished, or not what was marked."""
        spec = self._specs["outputs"]
        key = spec.key(subset, seed)
        mark = read_mark(self.path / _mark(subset, seed))
        if mark is None or mark.config != self._config or key not in mark.files:
            return None
        data = map_file(self.path / key)
        if data is None or damage(key, data, mark.files[key]) is not None:
            return None
        if len(data) != spec.num_bytes + TRAILER:
            return None  # whole, but of another number of queries
        return spec.unpack(data[:-TRAILER])[0, 0]

    def write(self, subset: int, seed: int, outputs: np.ndarray) -> None:
        """Keep the outputs ``[query]`` of one retraining: whole and flushed, then marked."""
        spec = self._specs["outputs"]
        chunk = spec.pack(np.asarray(outputs, np.float32)[None, None])
        files = [(spec.key(subset, seed), chunk)]
        rows = (subset, subset + 1)
        put_marked(self.path, _mark(subset, seed), files, rows, self._config)()

    def read(self) -> GroundTruth:
        """Everything, checksums verified. Raises StoreError where a retraining is missing."""
        outputs = np.empty((self.design.num_subsets, self._num_seeds, self.num_queries), "f4")
        missing = 0
        for unit in self.units():
            found = self._outputs(*unit)
            if found is None:
                missing += 1
            else:
                outputs[unit] = found
        if missing:
            raise StoreError(
                "the ground truth is not finished",
                where=self.path,
                found=f"{missing} of {len(self.units())} retrainings are missing",
                do="call ground_truth, or `tda evaluate CONFIG`, again: what is finished is kept",
            )
        if self.mask_fault() is not None:
            raise StoreError(
                "the subsets of this ground truth are damaged",
                where=self.path / STATIC,
                found=self.mask_fault(),
                do="call ground_truth, or `tda evaluate CONFIG`, again: it writes them anew",
            )
        return GroundTruth(self._masks, outputs, self.path, self.manifest)


def faults(run: Place, name: str, withdraw: bool) -> list[Fault]:
    """Every fault of RUN/evaluate/NAME; the marks of damaged retrainings are withdrawn if asked.

    `ground_truth`, called again, trains those again and no others.
    """
    check = FolderCheck(run, f"{FOLDER}/{name}", withdraw, _REDO)
    found = list(check.marked())
    check.known |= {_MANIFEST, *_DERIVED}
    try:
        manifest = _read_manifest(run / FOLDER / name)
    except StoreError as error:
        found.append(check.fault(_MANIFEST, "altered", error.what, error.do))
        return [*found, *check.others(complete=False)]
    record = Record(run / FOLDER / name, manifest, Design.parse(manifest["design"]))
    masks = record.mask_fault()
    if masks is None and check.stands(STATIC) and not record.has_masks():
        masks = "they are not those of its design"
    if masks is not None and STATIC not in check.bad | check.withdrawn:
        found.append(check.fault(STATIC, "altered", f"masks: {masks}"))
    for unit in record.units():
        key = _mark(*unit)
        if check.stands(key) and record._outputs(*unit) is None:
            found.append(check.bad_mark(key, "the mark is for another retraining"))
        elif key not in check.known:
            found.append(check.fault(key, "missing", "this retraining is not done yet"))
    return [*found, *check.others(complete=True)]


def _mask_rows(num_train: int) -> int:
    return max(1, min(_MASK_ROWS, _MASK_BYTES // num_train))


def _name(subset: int, seed: int) -> str:
    return f"{subset}-{seed}.json"


def _mark(subset: int, seed: int) -> str:
    return f"done/{_name(subset, seed)}"


def _read_manifest(path: Place) -> dict[str, Any]:
    file = path / _MANIFEST
    data = read_file(file, DOCUMENT_BYTES)
    if data is None:
        raise StoreError(
            "there is no ground truth in this folder",
            where=path,
            do="make one with tda.evaluate.ground_truth or `tda evaluate CONFIG`",
        )
    manifest = unseal(data)
    if manifest is None:
        raise StoreError(
            "the manifest of this ground truth was altered",
            where=file,
            do="restore it from a copy, or delete the folder and retrain",
        )
    fault = _manifest_fault(manifest)
    if fault is not None:
        raise StoreError(
            "the manifest of this ground truth makes no sense",
            where=file,
            found=fault,
            do="delete the folder and retrain; it was not written by this program",
        )
    return manifest


def _manifest_fault(manifest: Mapping[str, Any]) -> str | None:
    """What is wrong with it, or None. It may be a stranger's: sizes are checked before use."""
    try:
        counts = [manifest[part]["num_rows"] for part in ("train", "queries")]
        design = Design.parse(manifest["design"])
        numbers = [design.num_subsets, design.draw, *design.seeds]
        float(design.fraction or 0)
        left_out = [index for some in design.left_out or () for index in some]
        if not all(type(n) is int and 0 <= n <= MOST for n in (*counts, *numbers, *left_out)):
            return f"numbers that are none: {[*counts, *numbers]}"[:200]
        if min(counts) < 1 or max(left_out, default=0) >= counts[0]:
            return "examples or queries that are not there"
        if design.num_subsets * len(design.seeds) > _MOST_UNITS:
            return f"{design.num_subsets} subsets × {len(design.seeds)} seeds"
        if design.kind == "given" and len(design.left_out or ()) != design.num_subsets:
            return "another number of subsets than are given"
    except (ConfigError, KeyError, TypeError, ValueError, AttributeError) as error:
        return f"{type(error).__name__}: {error}"[:200]
    return None


def _continued(path: Place, stored: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """The stored design, grown to what is wanted. Raises MismatchError if it is another one."""
    for name in {**wanted, **stored}:
        there, here = stored.get(name), wanted.get(name)
        if name == "design":
            there, here = (
                {k: v for k, v in d.items() if k not in _GROWS} for d in (stored[name], here or {})
            )
        if there != here:
            raise MismatchError(
                f"this ground truth was made with another {name}",
                where=path,
                found=f"{name} = {here!r}",
                wanted=f"{name} = {there!r}, as it has it",
                do=_CURES.get(name, f"use the {name} of this ground truth, or another name"),
            )
    old, new = stored["design"], wanted["design"]
    fewer, more = sorted((old["seeds"], new["seeds"]), key=len)
    if more[: len(fewer)] != fewer:
        raise MismatchError(
            "this ground truth was made with other seeds",
            where=path,
            found=f"seeds = {new['seeds']}",
            wanted=f"seeds = {old['seeds']}, or more after them",
            do=_CURES["design"],
        )
    count = max(old["num_subsets"], new["num_subsets"])
    return {**old, "num_subsets": count, "seeds": more}
