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

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from tda.errors import MismatchError, StoreError
from tda.gradients import shapes_of
from tda.projection import Bases, Counts, bases_from_bytes, bases_to_bytes
from tda.store.files import Place, read_file, write_file
from tda.store.manifest import bases_by_checkpoint, bases_digest, bases_file, bases_files

if TYPE_CHECKING:
    from tda.task import Task

Fit = Callable[[int, Counts | None], Bases]  # checkpoint, the layout that is kept -> its bases


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
    shapes, known = shapes_of(task.model), {}
    for file, digest in bases_files(manifest).items():
        data = read_file(path / file) or b""
        if bases_digest(data) != digest:
            raise StoreError(
                "the bases of the projection are missing or were altered",
                where=path / file,
                do="restore the file from a copy, or index again into a new folder",
            )
        known[digest] = bases_from_bytes(data, shapes)
    return Fitted(known, bases_by_checkpoint(manifest), first)


def fit_bases(
    path: Place, known: Fitted | None, trainings: Sequence[Sequence[int]], fit: Fit
) -> Fitted:
    """Those of every checkpoint: ``known`` of the run where it has them, else fitted and written.

    trainings: the checkpoints of each, by their places. The last one's basis lays out the rows.
    """
    bases = dict(known.known) if known else {}
    of = dict(enumerate(known.digests)) if known else {}  # checkpoint -> digest
    first = known.first if known else ""
    for training in sorted(trainings, key=max, reverse=True):
        digest = next((of[c] for c in training if c in of), None)
        if digest is None:
            first_bases = bases.get(first, {})
            layout = {name: len(row) for name, (_, _, row, _) in first_bases.items()} or None
            found = fit(max(training), layout)
            data = bases_to_bytes(found)
            digest = bases_digest(data)
            first = first or digest
            bases[digest] = found
            write_file(path / bases_file(first, digest), data)
        of |= {c: digest for c in training if c not in of}
    return Fitted(bases, [of[c] for c in sorted(of)], first)
