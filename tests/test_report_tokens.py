"""Words shared by two texts: which are marked, and that nothing of a text is lost."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from tda.report.tokens import Words


def marked(words: Words, text: str, beside: str) -> list[str]:
    return [piece for piece, shared in words.pieces(text, beside) if shared]


def test_shared_words_are_marked_whatever_their_case_and_others_are_not():
    words = Words(["The plot never thickens", "a plot's twist"])
    assert marked(words, "Never a plot", "The plot never thickens") == ["Never", "plot"]
    assert marked(words, "a plot's end", "the plot thickens") == []  # another word


def test_what_a_fifth_of_the_texts_has_is_common():
    texts = [f"the film {i}" for i in range(8)] + ["good film", "good end"]
    words = Words(texts)
    assert marked(words, "the good film", "the good film") == ["good"]  # 2 of 10, not more
    assert marked(Words(texts[:9]), "the film", "the film") == ["the", "film"]  # too few to tell


@given(st.text(max_size=40), st.text(max_size=40))
def test_the_pieces_are_the_text(text, beside):
    words = Words([text, beside])
    assert "".join(piece for piece, _ in words.pieces(text, beside)) == text
