"""Batches of a data set for the featurizer: read ahead, and of examples alike in length; and what
it makes, written behind."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
import torch

from tda.data import Batch, Collate, Dataset, batches, collate, read, split

T = TypeVar("T")
Rows = np.ndarray  # numbers of examples
_END: Any = object()


def ahead(items: Iterable[T], count: int = 1) -> Iterator[T]:
    """The same items; while one is used, a thread makes the next ``count``.

    What making one raises is raised here, in its turn. Leaving early waits for those at hand.
    """
    source = iter(items)
    with ThreadPoolExecutor(1, thread_name_prefix="tda-reading") as reader:
        following = deque(reader.submit(next, source, _END) for _ in range(count))
        while (item := following.popleft().result()) is not _END:
            following.append(reader.submit(next, source, _END))
            yield item


def one_behind(items: Iterable[T]) -> Iterator[T]:
    """The same items, each once the next has been made."""
    before: list[T] = []
    for item in items:
        yield from before
        before = [item]
    yield from before


@contextmanager
def behind() -> Iterator[Callable[[Callable[[], None]], None]]:
    """Hands out what takes an action and does it in a thread, after the one before; the last is
    done when this is left. What an action raises is raised when the next is taken, or at the end.
    """
    last: list[Future[None]] = []
    with ThreadPoolExecutor(1, thread_name_prefix="tda-writing") as writer:

        def take(action: Callable[[], None]) -> None:
            if last:
                last.pop().result()
            last.append(writer.submit(action))

        yield take
        if last:
            last.pop().result()


def reading(
    dataset: Dataset, start: int, stop: int, batch_size: int, function: Collate | None = None
) -> Iterator[tuple[Rows, Batch]]:
    """(rows, batch) until all of ``start:stop`` were read, each once.

    In order, ``batch_size`` at a time; but texts that a collate function pads go by length, and as
    many to a batch as have, padded, the tokens of ``batch_size`` mean ones: little is computed for
    padding, and memory stays even. A function of the examples alone: resuming changes no byte.
    """
    if function is None or _length(read(dataset, start)) is None:
        for first, batch in batches(dataset, start, stop, batch_size, function):
            yield np.arange(first, min(first + batch_size, stop)), batch
        return
    examples = [read(dataset, index) for index in range(start, stop)]
    lengths = np.array([_length(example) or 0 for example in examples])
    for rows in by_length(lengths, batch_size):
        yield start + rows, collate([examples[row] for row in rows], function)


def by_length(lengths: np.ndarray, batch_size: int) -> Iterator[Rows]:
    """Batches by growing length, of at most ``batch_size`` · mean length tokens when padded."""
    budget = batch_size * lengths.mean()
    batch: list[int] = []
    for row in np.argsort(lengths, kind="stable").tolist():
        if batch and (len(batch) + 1) * lengths[row] > budget:
            yield np.array(batch)
            batch = []
        batch.append(row)
    yield np.array(batch)


def _length(example: Any) -> int | None:
    """Tokens of an example that is a text: ``input_ids``, or a first part of whole numbers."""
    content = split(example)[0]
    if isinstance(content, Mapping):
        tokens = content.get("input_ids")
    else:
        tokens = content[0]
    if not isinstance(tokens, torch.Tensor) or tokens.dtype.is_floating_point or tokens.ndim != 1:
        return None
    return len(tokens)
