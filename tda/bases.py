"""The bases of a projection that is fitted to the data: whose they are, and where they lie.

    projection.npz            those of the training that was last when the run was made
    projection-DIGEST.npz     those of another training, where rows are in the eigenbasis of K-FAC

Checkpoints of one training share a basis, so that their curvatures can be added and multiplied.
Another training has eigenvectors of its own: in those of the first its gradients are spread over
more coordinates than are kept. (Five trainings, `influence_shrunk` from 1,024 numbers each: LDS on
halves .574 → .645 and .624 → .706 for digits_mlp and penbased of the leaderboard.) Every layer
keeps as many coordinates as in the first, so that all rows have one layout.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tda.errors import MismatchError, StoreError
from tda.gradients import shapes_of
from tda.projection import Bases, Projection, bases_from_bytes, bases_to_bytes
from tda.store.files import Place, read_file, write_file
from tda.store.manifest import bases_by_checkpoint, bases_file
from tda.training.schedule import by_training

if TYPE_CHECKING:
    from tda.batch_size import BatchSize
    from tda.data import Dataset
    from tda.featurizer import Featurizer
    from tda.task import Task


@dataclass(frozen=True)
class Fitted:
    """known: bases by digest. digests: of every checkpoint. first: whose the layout of rows is."""

    known: Mapping[str, Bases]
    digests: Sequence[str]
    first: str

    def __iter__(self) -> Iterator[Bases]:
        """Those of every checkpoint."""
        return (self.known[digest] for digest in self.digests)

    @property
    def by_checkpoint(self) -> dict[str, list[str]]:
        """For the manifest, where not all are the same."""
        return {} if set(self.digests) == {self.first} else {"bases": list(self.digests)}


def digest_of(data: bytes) -> str:
    """As the manifest has it."""
    return hashlib.blake2b(data, digest_size=16).hexdigest()


def read_bases(path: Place, manifest: Mapping[str, Any], task: Task) -> Fitted:
    """Those of a run. Raises MismatchError if it has none, StoreError."""
    first = manifest["projection"].get("bases_digest")
    if first is None:
        raise MismatchError(
            "this run was made with another projection",
            where=path,
            found="a projection with bases",
            wanted=f"projection.kind = {manifest['projection']['kind']!r}, as the run has it",
            do="use the projection this run was made with, or index into a new folder",
        )
    digests = bases_by_checkpoint(manifest)
    shapes, known = shapes_of(task.model), {}
    for digest in dict.fromkeys([first, *digests]):
        file = path / bases_file(manifest, digest)
        data = read_file(file) or b""
        if digest_of(data) != digest:
            raise StoreError(
                "the bases of the projection are missing or were altered",
                where=file,
                do="restore the file from a copy, or index again into a new folder",
            )
        known[digest] = bases_from_bytes(data, shapes)
    return Fitted(known, digests, first)


def fit_bases(
    path: Place,
    stored: Mapping[str, Any] | None,
    featurizer: Featurizer,
    projection: Projection,
    dataset: Dataset,
    batch_size: BatchSize,
    progress: bool,
) -> Fitted:
    """Those of every checkpoint of the featurizer's task: read where the run has them, and fitted
    and written where it has not. Raises as `read_bases` does."""
    records = featurizer.task.manifest()["checkpoints"]
    last, own = len(records) - 1, projection.kind == "eigenbasis"
    trainings = by_training(records) if own else [list(range(len(records)))]
    known: dict[str, Bases] = {}
    found: dict[int, str] = {}  # checkpoint -> digest

    def fitted(checkpoint: int, first: Bases | None) -> tuple[str, Bases]:
        bases = featurizer.fit(projection, dataset, batch_size, progress, checkpoint, first)
        digest = digest_of(bases_to_bytes(bases))
        known[digest] = bases
        return digest, bases

    if stored is None:
        first, layout = fitted(last, None)
        write_file(path / bases_file(None, first), bases_to_bytes(layout))
        found[last] = first
    else:
        before = read_bases(path, stored, featurizer.task)
        known, first, layout = {**before.known}, before.first, before.known[before.first]
        found = dict(enumerate(before.digests))
    manifest = {"projection": {"bases_digest": first}}
    for training in trainings:
        digest = next((found[c] for c in training if c in found), None)
        if digest is None:
            digest, bases = fitted(training[-1], layout)
            write_file(path / bases_file(manifest, digest), bases_to_bytes(bases))
        found |= {c: digest for c in training if c not in found}
    return Fitted(known, [found[c] for c in range(len(records))], first)
