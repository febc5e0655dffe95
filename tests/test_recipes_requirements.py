"""A recipe a run cannot answer is refused by what is missing and what would cure it."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import naive
import numpy as np
import pytest
from memory_store import MemoryStore, exact_rows, make_store

from tda.config import Config
from tda.errors import RecipeError, StoreError
from tda.recipe import Recipe
from tda.recipes import RECIPES
from tda.scorer import damping_used, prepare, scores, self_influence


def variant(name: str, **changes: Any) -> Recipe:
    return replace(RECIPES[name], **changes)


def mixed(store: MemoryStore) -> MemoryStore:
    """Without layers, as a count sketch is."""
    manifest = {key: value for key, value in store.manifest.items() if key != "layers"}
    return replace(store, manifest=manifest)


def refused(store: MemoryStore, recipe: Recipe) -> RecipeError:
    with pytest.raises(RecipeError) as error:
        prepare(store, recipe, store.queries)
    assert recipe.name in str(error.value)
    with pytest.raises(RecipeError):
        self_influence(store, recipe)
    return error.value


@pytest.mark.parametrize(
    ("recipe", "cure"),
    [
        (RECIPES["influence_cg"], "tda.attribute"),
        (RECIPES["influence_ekfac"], "eigenbasis"),
        (RECIPES["trackstar"], "metric='second_moment'"),
        (RECIPES["less"], "metric='adam_update'"),
        (RECIPES["influence_gn"], "add_curvature"),
        (RECIPES["datainf"], "blocks='whole'"),
        (variant("tracin", layer_weights=(("last", 0.5),)), "layer_weights=()"),
        (variant("influence", metric="adam"), "metric='adam'"),
    ],
)
def test_what_the_run_lacks_is_named_with_its_cure(recipe, cure, tmp_path):
    error = refused(mixed(make_store(tmp_path)), recipe)
    assert cure in (error.do or "")


@pytest.mark.parametrize("name", ["influence_ekfac", "influence_gn", "datainf"])
def test_a_cure_is_spelt_as_a_configuration_has_it_too(name, tmp_path):
    error = refused(mixed(make_store(tmp_path)), RECIPES[name])
    said = re.search(r"(\w+ = true in )?\[(\w+)\]( kind)?", error.do or "")
    section, key = said[2], (said[1] or said[3]).split()[0]
    assert key in Config.model_fields[section].annotation.model_fields


def test_with_what_was_missing_the_recipe_answers(tmp_path):
    store = make_store(tmp_path).with_curvature()
    for recipe, changes in (
        (RECIPES["influence_ekfac"], {"projection": {"kind": "eigenbasis"}}),
        (RECIPES["trackstar"], {"metric": "second_moment"}),
        (RECIPES["less"], {"metric": "adam_update"}),
        (RECIPES["influence_gn"], {}),
        (RECIPES["datainf"], {}),
    ):
        made = store.with_manifest(**changes)
        prepare(made, recipe, made.queries)


def test_a_layer_that_is_misspelt_is_answered_with_the_nearest(tmp_path):
    error = refused(make_store(tmp_path), variant("grad_dot", layer_weights=(("lsat", 2.0),)))
    assert "'lsat'" in error.what
    assert "did you mean 'last'?" in str(error)


@pytest.mark.parametrize(
    "known", [{"learning_rate": None}, {"step": None}, {"step": None, "learning_rate": None}]
)
def test_training_whose_length_is_not_known_is_not_unrolled(known, tmp_path):
    store = make_store(tmp_path, num_checkpoints=2).with_checkpoints({}, known)
    assert "learning_rate" in (refused(store, RECIPES["source"]).do or "")


def test_independent_models_are_no_training_to_unroll(tmp_path):
    """Their steps do not grow, so the sums of their learning rates do not either."""
    same = {"step": 100, "learning_rate": 0.1}
    store = make_store(tmp_path, num_checkpoints=3).with_checkpoints(same, same, same)
    for segments in (1, 3):
        error = refused(store, variant("source", segments=segments))
        assert "follow" in error.what
        assert "step 1" in str(error)


def test_a_table_of_curvature_that_is_not_finished_is_not_used(tmp_path, monkeypatch):
    store = make_store(tmp_path).with_curvature()

    def unfinished(table: Any) -> None:
        if table.name == "curvature":
            raise StoreError("3 of 8 chunks are not computed yet")

    monkeypatch.setattr("memory_store.MemoryTable.require_complete", unfinished)
    with pytest.raises(StoreError, match="not computed yet"):
        prepare(store, RECIPES["influence_gn"], store.queries)
    prepare(store, RECIPES["influence"], store.queries)


def test_a_changed_table_of_curvature_or_query_set_is_another_curvature(tmp_path):
    """What is kept follows from all rows that were read, not from the training set alone."""
    store = make_store(tmp_path).with_curvature().mark()
    for recipe, name in (
        (RECIPES["influence_gn"], "curvature"),
        (variant("influence", query_share=0.5), "queries/q"),
    ):
        mark = tmp_path / name / "done" / "c0-0.json"
        found = []
        for scale in (1.0, 10.0):
            table = store.table(name)
            changed = replace(table, values=np.float32(scale) * table.values)
            one = replace(store, tables={**store.tables, name: changed})
            mark.write_text(str(scale))
            found.append(damping_used(one, recipe, one.queries)[0])
        assert found[1] > 2 * found[0]


# Updates by Adam.


def test_adam_updates_are_rows_that_lower_the_loss_as_they_are(tmp_path):
    """LESS: Σ_c η_c cos(−∇ℓ_q, −Γ_i); the slope of a training example is in its update already."""
    store = make_store(tmp_path, num_checkpoints=3).with_manifest(metric="adam_update")
    rates = [c["learning_rate"] for c in store.manifest["checkpoints"]]
    updates = [-rows.df for rows in exact_rows(store)]
    wanted = naive.less(exact_rows(store, "queries/q"), updates, rates)
    prepared = prepare(store, RECIPES["less"], store.queries)
    found = scores(prepared).compute(scheduler="synchronous")
    assert naive.relative_error(found, wanted) < 1e-5


@pytest.mark.parametrize("name", ["influence", "d_trak", "trackstar", "source"])
def test_adam_updates_make_no_curvature_and_have_no_margin(name, tmp_path):
    store = make_store(tmp_path).with_manifest(metric="adam_update")
    refused(store, variant(name, metric="any"))


@pytest.mark.parametrize("name", ["less", "grad_dot"])
def test_adam_updates_are_no_queries(name, tmp_path):
    store = make_store(tmp_path).with_manifest(metric="adam_update")
    with pytest.raises(RecipeError, match="self-influence"):
        self_influence(store, RECIPES[name])
