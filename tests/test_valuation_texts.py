"""Texts that differ by a word are copies; templates, short texts and other texts are not."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest

from tda.examples import MAX_TEXT
from tda.valuation.texts import WORDS, near_equal

LONG = "the quick brown fox jumps over the lazy dog and then it sleeps"


def is_near(a: str, b: str) -> bool:
    left, _ = near_equal([a], [b])
    return len(left) == 1


@pytest.mark.parametrize(
    ("other", "near"),
    [
        (LONG, True),
        (LONG.upper() + "!", True),
        (LONG.replace("lazy ", ""), True),
        (LONG.replace("lazy", "idle"), True),
        (LONG + " again", True),
        (LONG.replace("lazy", "idle").replace("quick", "fast"), False),
        (LONG.replace("lazy ", "").replace("quick ", ""), False),
        (" ".join(LONG.split()[:WORDS - 1]), False),
    ],
)  # fmt: skip
def test_one_word_is_near_and_two_are_not(other, near):
    assert is_near(LONG, other) == is_near(other, LONG) == near


def test_short_texts_are_never_near_by_a_word():
    assert not is_near("the text of train-1", "the text of train-2")
    assert not is_near("a b c d e f g h i", "a b c d e f g h i")  # equal content has its own rule


def test_of_texts_that_were_cut_nothing_is_said():
    cut = ("word " * MAX_TEXT)[:MAX_TEXT]
    assert not is_near(cut, cut)


def test_it_is_the_definition_on_random_texts():
    """Against word lists with at most one left out of each, compared one by one."""
    rng = np.random.default_rng(0)
    base = [list(rng.choice(list("abcdefghij"), 12)) for _ in range(6)]
    texts = []
    for words in base:
        for _ in range(4):
            mine = list(words)
            for _ in range(int(rng.integers(0, 3))):
                mine[int(rng.integers(len(mine)))] = str(rng.choice(list("xyz")))
            texts.append(" ".join(mine))

    def rests(text: str) -> set[tuple[str, ...]]:
        words = tuple(text.split())
        return {words} | {words[:i] + words[i + 1 :] for i in range(len(words))}

    wanted = [bool(rests(a) & rests(b)) for a, b in combinations(texts, 2)]
    assert [is_near(a, b) for a, b in combinations(texts, 2)] == wanted
    assert 0 < sum(wanted) < len(wanted)
