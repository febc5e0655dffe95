"""What finished cells came to, kept in the repository: jobs/leaderboard/TASK.json.

A file holds the rows of one ground truth, told apart by its digest, so that figures of different
retrainings never stand side by side. Rows of the same truth join it. Those of another one, made on
another machine say, take the whole file's place once they are no fewer, from no fewer retrainings.

    truth     digest, and what the page says of it
    rows      a cell each (what differs from `cells.Cell`'s defaults), its LDS, seconds, memory, …
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np

from tda.code import load_code
from tda.evaluate import GroundTruth

Found = dict[str, Any]  # {"truth", "about", "ceilings", "rows"}
Cell: Any = load_code("cells.py:Cell", Path(__file__).parent)
_DEFAULTS = {field.name: field.default for field in fields(Cell)}
_DIGITS = 5  # of a measured number
_ONLY_HERE = ("judged_by",)
_ENOUGH, _ALIKE = 3, 0.01  # rows that two machines must both have, and by how much LDS may differ


def digest(truths: Mapping[str, GroundTruth]) -> str:
    """Of all masks and outputs: another retraining is another truth."""
    hashed = hashlib.blake2b(digest_size=8)
    for name in sorted(truths):
        hashed.update(name.encode())
        for array in (truths[name].masks, truths[name].outputs):
            hashed.update(repr(array.shape).encode())
            hashed.update(np.ascontiguousarray(array).tobytes())
    return hashed.hexdigest()


def file_of(folder: Path, task: str) -> Path:
    return folder / f"{task}.json"


def read(file: Path) -> Found | None:
    if not file.exists():
        return None
    found = json.loads(file.read_text(encoding="utf-8"))
    for row in found["rows"]:
        row["cell"] = {**_DEFAULTS, **row["cell"]}
    return found


def write(file: Path, found: Found) -> None:
    """A row a line, in the order of their names."""
    file.parent.mkdir(parents=True, exist_ok=True)
    head = {name: value for name, value in found.items() if name != "rows"}
    rows = sorted(found["rows"], key=name_of)
    lines = [json.dumps(_short(row), ensure_ascii=False) for row in rows]
    body = json.dumps(_rounded(head), ensure_ascii=False, indent=1)[:-2]
    text = body + ',\n "rows": [\n  ' + ",\n  ".join(lines) + "\n ]\n}\n"
    partial = file.with_suffix(".part")
    partial.write_text(text, encoding="utf-8")
    partial.replace(file)


def joined(kept: Found | None, found: Found) -> Found | None:
    """What is to be kept of the file and of what was found here; None: the file as it is.

    Retrainings on another machine differ in rounding. Where all that both have came out alike, rows
    that are new join the others.
    """
    if kept is None:
        return found
    same = kept["truth"]["digest"] == found["truth"]["digest"]
    if same or _agree(kept, found):
        rows = {name_of(row): row for row in kept["rows"]}
        for row in found["rows"]:
            there = "lds" in rows.get(name_of(row), {})
            if not there or (same and "lds" in row):
                rows[name_of(row)] = row
        head = found if same else kept
        return {**head, "rows": list(rows.values())}
    return found if _size(found) >= _size(kept) and _told(found) >= _told(kept) else None


def _agree(kept: Found, found: Found) -> bool:
    """Whether as many retrainings gave the rows that both have the same figures."""
    there, here = (
        {name_of(row): row["lds"] for row in of["rows"] if row.get("lds")} for of in (kept, found)
    )
    both = there.keys() & here
    alike = all(
        abs(there[name][protocol]["value"] - here[name][protocol]["value"]) <= _ALIKE
        for name in both
        for protocol in there[name].keys() & here[name]
    )
    return alike and len(both) >= _ENOUGH and _size(kept) == _size(found)


def name_of(row: Mapping[str, Any]) -> str:
    """Of a row's cell."""
    cell = Cell(**row["cell"])
    return f"{cell.part}-{cell.kind}-{cell.name}"


def _size(found: Found) -> int:
    return int(found["truth"]["retrainings"])


def _told(found: Found) -> int:
    return sum("lds" in row for row in found["rows"])


def _short(row: Mapping[str, Any]) -> dict[str, Any]:
    cell = {name: value for name, value in row["cell"].items() if value != _DEFAULTS[name]}
    kept = {name: value for name, value in row.items() if name not in _ONLY_HERE}
    return _rounded({**kept, "cell": cell})


def _rounded(value: Any) -> Any:
    """Numbers to a few digits: the rest of them is noise, and lines stay short."""
    if isinstance(value, float):
        return float(f"{value:.{_DIGITS}g}")
    if isinstance(value, Mapping):
        return {name: _rounded(one) for name, one in value.items()}
    return [_rounded(one) for one in value] if isinstance(value, list) else value
