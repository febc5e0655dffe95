"""What readers decide about training examples, kept with the run in ``actions/marks.jsonl``.

One line a decision, appended whole under a lock: the last line about an example is what holds.
Nothing is ever lost, whoever marks at the same time, in this process or another. A line that was
cut short by a crash was never acknowledged; the next writer takes it away. A line has its number
and its checksum: one that was altered, or is gone from between others, is noticed; and
``actions/count.jsonl`` says how many there have been, so that the last ones are missed as well.
"""

from __future__ import annotations

import csv
import io
import json
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from threading import Lock
from typing import Any, Literal, get_args

from tda.errors import StoreError, TdaError
from tda.store.bounds import DOCUMENT_BYTES
from tda.store.files import (
    Place,
    Stat,
    crc32c,
    extend_file,
    read_file,
    stat_file,
    write_file,
)

Action = Literal["relabel", "remove", "keep", "none"]
FILE, COUNT = "actions/marks.jsonl", "actions/count.jsonl"
_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # what a spreadsheet takes for the start of one


@dataclass(frozen=True)
class Mark:
    """A decision about a training example; ``none`` withdraws an earlier one.

    revision: the number of the line that says so, counted from 1.
    """

    id: str
    action: Action
    label: str | None = None  # the right one, for relabel
    note: str = ""
    at: str = ""
    revision: int = 0


class ConflictError(TdaError):
    """Somebody else decided about this example in the meantime."""


class Marks:
    """The marks of one run. Safe to use from many threads and processes."""

    def __init__(self, run: Place) -> None:
        self.run, self.path = run, run / FILE
        self._lock = Lock()
        self._read: tuple[Stat, dict[str, Mark]] | None = None

    def all(self) -> dict[str, Mark]:
        """Id → mark, in the order of the last decision. Raises StoreError for a damaged file."""
        seen = stat_file(self.path)
        if seen is None:
            return {}
        if self._read is None or self._read[0] != seen:
            self._read = seen, self._parse(read_file(self.path, DOCUMENT_BYTES) or b"")
        return self._read[1]

    def fault(self) -> tuple[str, str, str] | None:
        """(the file, what is wrong with it, what to do), or None."""
        try:
            self.all()
            data = read_file(self.path, DOCUMENT_BYTES) or b""
        except StoreError as error:
            return FILE, f"{error.what}: {error.where}", error.do or ""
        if data and not data.endswith(b"\n"):
            return (
                FILE,
                "its last line was cut short, by a crash or later",
                "the next decision takes this line away; restore the file if it held another",
            )
        return self._count_fault(data)

    def _count_fault(self, data: bytes) -> tuple[str, str, str] | None:
        """Lines that are gone from the end. One written by hand has no number: then none counts."""
        lines = data.split(b"\n")[:-1]
        counts = read_file(self.run / COUNT, DOCUMENT_BYTES)
        last = _parsed(lines[-1]) if lines else None
        if (counts is None and not lines) or (last is not None and not last.revision):
            return None
        known = None if counts is None else _counted(counts)
        if known is None:
            what = "there is no count of decisions" if counts is None else "it was altered"
            do = "delete it, the next decision begins another; see that no line of the log is gone"
            return COUNT, what, do
        if known > len(lines):
            what = f"{known - len(lines)} decisions are gone from its end"
            return FILE, what, f"restore the file from a copy; or accept it: delete {COUNT}"
        return None

    def set(
        self, name: str, action: Action, label: str | None, note: str, seen: int | None = None
    ) -> Mark:
        """Decide about the example ``name``; durable on return.

        seen: the revision of the mark the decision replaces, 0 for none; None to replace any.
        Raises ConflictError if another one holds by now, StoreError if it cannot be written.
        """
        made: list[Mark] = []

        def line_after(whole: bytes) -> bytes:
            before = self._parse(whole)
            known = before.get(name)
            revision = known.revision if known is not None else 0
            if seen is not None and seen != revision:
                raise _changed(name, known)
            at = datetime.now(UTC).isoformat(timespec="seconds")
            made.append(Mark(name, action, label, note, at, whole.count(b"\n") + 1))
            return _line(made[-1])

        with self._lock:
            extend_file(self.path, line_after)
            extend_file(self.run / COUNT, lambda _: _sealed({"lines": made[-1].revision}))
        return made[-1]

    def _parse(self, data: bytes) -> dict[str, Mark]:
        marks: dict[str, Mark] = {}
        for revision, line in enumerate(data.split(b"\n")[:-1], start=1):
            mark = _parsed(line)
            if mark is None or mark.revision not in (0, revision):
                raise StoreError(
                    "a mark cannot be read" if mark is None else "a mark before this one is gone",
                    where=f"{self.path}, line {revision}",
                    found=line[:80].decode("utf-8", "replace"),
                    do="restore the file from a copy; or mend or delete this line, and the "
                    "numbers and checksums of those after it, which may be left out",
                )
            marks.pop(mark.id, None)
            if mark.action != "none":
                marks[mark.id] = replace(mark, revision=revision)
        return marks


def copy(run: Place, to: Place, but: set[str]) -> None:
    """The decisions of a run as those of another, without those about some examples."""
    kept = [mark for mark in Marks(run).all().values() if mark.id not in but]
    if kept:
        lines = (_line(replace(mark, revision=i)) for i, mark in enumerate(kept, start=1))
        write_file(to / FILE, b"".join(lines))
        write_file(to / COUNT, _sealed({"lines": len(kept)}))


def _line(mark: Mark) -> bytes:
    return _sealed(asdict(mark))


def _sealed(parts: dict[str, Any]) -> bytes:
    return json.dumps({**parts, "crc32c": f"{crc32c(_spelled(parts)):08x}"}).encode() + b"\n"


def _counted(data: bytes) -> int | None:
    """The largest count: of two writers the earlier may be late. None: a line was altered."""
    lines = data.splitlines(keepends=True)
    try:
        counts = [int(json.loads(line)["lines"]) for line in lines]
    except (ValueError, TypeError, KeyError, RecursionError):
        return None
    whole = all(_sealed({"lines": n}) == line for n, line in zip(counts, lines, strict=True))
    return max(counts, default=0) if whole else None


def _spelled(parts: dict[str, Any]) -> bytes:
    return json.dumps(parts, sort_keys=True).encode()


def _parsed(line: bytes) -> Mark | None:
    """The mark of a line, or None if it is none or was altered. Both its number and its checksum
    may be absent: then somebody wrote it by hand."""
    try:
        parts = json.loads(line)
        is_sealed, sealed = "crc32c" in parts, parts.pop("crc32c", None)
        mark = Mark(**parts)
        whole = not is_sealed or sealed == f"{crc32c(_spelled(parts)):08x}"
        texts = isinstance(mark.label, str | None) and all(
            isinstance(text, str) for text in (mark.id, mark.note, mark.at)
        )
        counted = type(mark.revision) is int
        sound = whole and texts and counted and mark.action in get_args(Action)
        return mark if sound else None
    except (ValueError, TypeError, AttributeError, RecursionError):
        return None


def _changed(name: str, known: Mark | None) -> ConflictError:
    return ConflictError(
        "this example has been marked in the meantime",
        where=name,
        found="nothing: the mark was withdrawn"
        if known is None
        else f"{known.action} {known.label or ''} {known.note}".strip(),
        do="look at that mark; send again with its revision to replace it",
    )


def as_csv(marks: list[Mark]) -> str:
    """id, action, label, note, at. What a spreadsheet would run as a formula has a ' before it."""
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    names = ("id", "action", "label", "note", "at")
    writer.writerow(names)
    for mark in marks:
        cells = (str(getattr(mark, name) or "") for name in names)
        writer.writerow("'" + cell if cell.startswith(_FORMULA) else cell for cell in cells)
    return file.getvalue()
