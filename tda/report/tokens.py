"""The words a training text shares with a query, marked where the two stand side by side."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable

COMMON = 0.2  # a word in more than this share of the texts shown says nothing of any of them
ENOUGH = 10  # with fewer texts than this no word counts as common
_WORD = re.compile(r"\w+(?:['’]\w+)*")


class Words:
    """The words of the texts on a page, without those that are common there."""

    def __init__(self, texts: Iterable[str]) -> None:
        every = [self._of(text) for text in texts]
        count = Counter(word for words in every for word in words)
        most = COMMON * len(every) if len(every) >= ENOUGH else len(every)
        self._common = {word for word, number in count.items() if number > most}

    def pieces(self, text: str, beside: str) -> list[tuple[str, bool]]:
        """``text`` cut into (piece, whether it is a word of ``beside``); joined, they are it."""
        wanted, cut, last = self._of(beside) - self._common, [], 0
        for match in _WORD.finditer(text):
            if match[0].casefold() in wanted:
                cut += [(text[last : match.start()], False), (match[0], True)]
                last = match.end()
        return [piece for piece in (*cut, (text[last:], False)) if piece[0]]

    @staticmethod
    def _of(text: str) -> set[str]:
        return {word.casefold() for word in _WORD.findall(text)}
