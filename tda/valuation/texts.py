"""Texts that differ by one word in ten or less: added, left out, or put in another's place.

Two texts are near-equal when what is left of each after leaving out at most one word is the same
(words without case and punctuation). Found by the hashes of all that can be left of a text, in
time linear in the number of words, without a model: a network may tell apart what one word
changes, though a reader would call it a copy.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from tda.examples import MAX_TEXT

WORDS = 10  # of the shorter text at least: one word of fewer may change all
MOST = 100_000  # texts looked at; their hashes are held, one a word
_WORD = re.compile(r"\w+(?:['’]\w+)*")


def near_equal(left: Sequence[str], right: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """(left, right) indices of near-equal texts: each text of ``left`` with the first of ``right``
    that shares what is left of it."""
    first: dict[int, int] = {}
    for index, text in enumerate(right):
        for rest in _rests(text):
            first.setdefault(rest, index)
    found = {
        (i, first[rest]) for i, text in enumerate(left) for rest in _rests(text) if rest in first
    }
    pairs = np.array(sorted(found), np.int64).reshape(-1, 2)
    return pairs[:, 0], pairs[:, 1]


def near_texts(left: Any, right: Any, within: bool) -> tuple[np.ndarray, np.ndarray]:
    """The same of two tables, or of pairs within one, the smaller index left; none where there are
    no texts, or too many."""
    none = np.zeros(0, np.int64), np.zeros(0, np.int64)
    if not all("text" in table.columns() for table in (left, right)):
        return none
    if max(left.num_rows, right.num_rows) > MOST:
        return none
    a, b = near_equal(left.column("text").tolist(), right.column("text").tolist())
    return (b[b < a], a[b < a]) if within else (a, b)


def _rests(text: str) -> Iterator[int]:
    """Hashes of the words of a text, and of all but one of them."""
    words = _WORD.findall(text.casefold())
    if len(words) < WORDS or len(text) >= MAX_TEXT:  # a run keeps no more of a longer one
        return
    if len(words) > WORDS:  # one less is still enough of it
        for place in range(len(words)):
            yield hash((*words[:place], *words[place + 1 :]))
    yield hash(tuple(words))
