"""Gates: they fire when the comparison holds, and never pass by mistake."""

from __future__ import annotations

import operator

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tda.errors import ConfigError
from tda.report.gates import fired, look_up, parse

SUMMARY = {
    "trust": {"num_failed": 2, "verdict": "no", "share_reliable": None},
    "decisions": {"share_leaked": 0.05, "num_mislabelled": 0},
    "queries": [{"loss": 3.5}],
    "in_loss": True,
}
WORDS = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge,
         "==": operator.eq, "!=": operator.ne}  # fmt: skip


@given(
    st.sampled_from(sorted(WORDS)),
    st.floats(-1e6, 1e6, allow_nan=False).map(lambda x: round(x, 3)),
    st.sampled_from([0.0, 0.05, -3.0, 2e5]),
)
def test_a_gate_is_the_comparison_it_spells(op, number, held):
    """fires ⇔ held OP number, as Python compares."""
    gate = parse(f" a.b {op}{number!r}")
    assert gate.fires({"a": {"b": held}}) == WORDS[op](held, number)


@pytest.mark.parametrize(
    ("text", "fires"),
    [
        ("decisions.share_leaked > 5%", False),
        ("decisions.share_leaked>=5 %", True),
        ("queries.0.loss > 3", True),
        ("in_loss == 1", True),
        ("trust.num_failed != 2", False),
        ("decisions.num_mislabelled < 1e-3", True),
    ],
)
def test_paths_percents_places_and_truths_are_read(text, fires):
    assert bool(fired([parse(text)], SUMMARY)) is fires


def test_several_gates_fire_each_for_itself():
    gates = [parse(text) for text in ("trust.num_failed > 1", "trust.num_failed > 2")]
    assert [(gate.text, value) for gate, value in fired(gates, SUMMARY)] == [
        ("trust.num_failed > 1", 2.0)
    ]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "a",
        "a >",
        "> 1",
        "a > b",
        "a > 1 or b > 2",
        "a = 1",
        "__import__('os') > 1; x",
        "a > nan",
    ],
)
def test_nothing_else_is_understood(text):
    with pytest.raises(ConfigError, match="cannot be read"):
        parse(text)


def test_a_key_that_is_not_there_is_an_error_that_names_those_that_are():
    for key, says in (
        ("decisions.share_leakd", "decisions.share_leaked"),
        ("share_leaked", "decisions.share_leaked"),
        ("queries.1.loss", "queries.1.loss"),
        ("trust.verdict", "str"),
        ("trust", "trust.num_failed"),
    ):
        with pytest.raises(ConfigError) as caught:
            look_up(SUMMARY, key)
        assert says in str(caught.value)


def test_a_number_that_is_not_known_never_passes():
    with pytest.raises(ConfigError, match="cannot tell"):
        fired([parse("trust.share_reliable < 0.5")], SUMMARY)
