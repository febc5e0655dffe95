"""A recipe says one thing only: it checks itself, cannot change, and its errors name the cure."""

from __future__ import annotations

import dataclasses
import pickle
import subprocess
import sys

import pytest

from tda.errors import RecipeError
from tda.recipe import Recipe
from tda.recipes import RECIPES, get_recipe
from tda.recipes.auto import recipe_for

PUBLISHED = {
    "grad_dot", "grad_cos", "tracin", "less", "trak", "d_trak", "trackstar", "influence",
    "influence_gn", "influence_ekfac", "influence_shrunk", "influence_cg", "relatif", "relatif_l",
    "datainf", "arnoldi", "source",
}  # fmt: skip


INVERSE = {"curvature": "gram", "function": "inverse"}


def made(**fields) -> Recipe:
    return Recipe(name="mine", summary="s", formula="f", reference="r", **fields)


def test_each_published_recipe_is_found_by_its_own_name():
    assert set(RECIPES) == PUBLISHED
    assert all(get_recipe(name).name == name for name in PUBLISHED)
    assert get_recipe(RECIPES["trak"]) is RECIPES["trak"]


@pytest.mark.parametrize("name", sorted(PUBLISHED))
def test_a_recipe_documents_itself_and_explains_itself_in_one_line(name):
    recipe = RECIPES[name]
    assert recipe.summary.endswith(".")
    assert recipe.formula
    assert recipe.reference
    assert recipe.explain().startswith(f"{name}: score = ")
    assert "\n" not in recipe.explain()


def test_recipes_that_score_differently_explain_themselves_differently():
    variants = [
        *RECIPES.values(),
        dataclasses.replace(RECIPES["influence"], damping=0.1),
        dataclasses.replace(RECIPES["influence"], curvature="diagonal"),
        dataclasses.replace(RECIPES["influence"], curvature_rows="loss"),
        dataclasses.replace(RECIPES["influence"], normalize="train"),
        dataclasses.replace(RECIPES["influence"], normalize="query"),
        dataclasses.replace(RECIPES["influence"], query="margin"),
        dataclasses.replace(RECIPES["influence"], train="margin"),
        dataclasses.replace(RECIPES["influence"], checkpoint_weight="learning_rate"),
        dataclasses.replace(RECIPES["influence"], scale="one"),
        dataclasses.replace(RECIPES["trak"], train="margin"),
        dataclasses.replace(RECIPES["influence"], blocks="layer"),
        dataclasses.replace(RECIPES["influence"], query_share=0.5),
        dataclasses.replace(RECIPES["influence"], query_share=0.25),
        dataclasses.replace(RECIPES["influence"], rank=7),
        dataclasses.replace(RECIPES["influence"], rank=8),
        dataclasses.replace(RECIPES["influence"], function="mean_of_inverses"),
        dataclasses.replace(RECIPES["influence"], layer_weights=(("fc", 0.5),)),
        dataclasses.replace(RECIPES["influence"], layer_weights=(("fc", 0.25),)),
        dataclasses.replace(RECIPES["influence"], metric="adam"),
        dataclasses.replace(RECIPES["influence"], metric="second_moment"),
        dataclasses.replace(RECIPES["influence"], basis="eigen"),
        dataclasses.replace(RECIPES["influence"], space="parameters"),
        dataclasses.replace(RECIPES["source"], segments=2),
        dataclasses.replace(RECIPES["source"], damping=0.1),
        dataclasses.replace(RECIPES["less"], metric="any"),
    ]
    assert len({recipe.explain() for recipe in variants}) == len(variants)


def test_a_recipe_is_a_frozen_hashable_picklable_value():
    recipe = RECIPES["influence"]
    with pytest.raises(dataclasses.FrozenInstanceError):
        recipe.damping = 1.0
    with pytest.raises(TypeError):
        RECIPES["influence"] = recipe
    assert pickle.loads(pickle.dumps(recipe)) == recipe
    assert hash(dataclasses.replace(recipe)) == hash(recipe)
    assert dataclasses.replace(recipe, damping=0.1).damping == 0.1


@pytest.mark.parametrize(
    "fields",
    [
        {"function": "inverse"},
        {"curvature": "gram"},
        {"damping": 0.1},
        {"combine": "product_of_means", "checkpoint_weight": "learning_rate"},
        {"combine": "product_of_means", "normalize": "train"},
        {"combine": "product_of_means", "normalize": "both"},
        {"blocks": "layer"},
        {"query_share": 0.5},
        {"rank": 3},
        {"segments": 2},
        {"norm": "step", "normalize": "train"},
        {"norm": "step", **INVERSE},
        {"query_share": 0.5, "curvature_rows": "gauss_newton", **INVERSE},
        {"segments": 2, **INVERSE},
        {"layer_weights": (("fc", 0.5),), "normalize": "train", **INVERSE},
        {"metric": "adam_update", "train": "margin"},
        {"metric": "adam_update", **INVERSE},
        {"function": "mean_of_inverses"},
        {"function": "mean_of_inverses", "curvature": "diagonal"},
        {"function": "mean_of_inverses", "curvature": "gram", "damping": 0},
        {"function": "mean_of_inverses", "curvature": "gram", "rank": 3},
        {"function": "mean_of_inverses", "curvature": "gram", "curvature_rows": "gauss_newton"},
        {"function": "unrolled"},
        {"function": "unrolled", "curvature": "gram", "rank": 3},
        {"function": "unrolled", "curvature": "gram", "normalize": "query"},
        {"function": "unrolled", "curvature": "gram", "query_share": 0.5},
        {"function": "unrolled", "curvature": "gram", "combine": "product_of_means"},
        {"function": "unrolled", "curvature": "gram", "checkpoint_weight": "learning_rate"},
    ],
)
def test_choices_that_contradict_each_other_are_refused_with_a_cure(fields):
    with pytest.raises(RecipeError) as error:
        made(**fields)
    assert "'mine'" in str(error.value)
    assert error.value.do


@pytest.mark.parametrize("damping", [-1, float("nan"), float("inf"), "big", None, True])
def test_damping_is_auto_or_a_number_at_least_zero(damping):
    with pytest.raises(RecipeError, match="damping is not a number"):
        made(curvature="gram", function="inverse", damping=damping)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("query_share", value) for value in (-0.1, 1.1, float("nan"), "half", None, True)),
        *(("rank", value) for value in (0, -1, 2.5, "all", True)),
        *(("segments", value) for value in (0, 1.5, None, True)),
        ("layer_weights", [("fc", 1.0)]),
        ("layer_weights", (("fc", -1.0),)),
        ("layer_weights", (("fc", float("inf")),)),
        ("layer_weights", (("fc", 1.0), ("fc", 2.0))),
        ("layer_weights", (("fc",),)),
        ("layer_weights", ((3, 1.0),)),
        ("layer_weights", {"fc": 1.0}),
    ],
)
def test_a_number_out_of_range_names_its_field_and_what_is_wanted(field, value):
    with pytest.raises(RecipeError, match=f"^{field} ") as error:
        made(**{**INVERSE, field: value})
    assert error.value.wanted
    assert error.value.found == repr(value)


def test_an_unknown_choice_names_the_field_the_choices_and_the_nearest():
    with pytest.raises(RecipeError) as error:
        made(curvature="grams", function="inverse")
    message = str(error.value)
    assert "curvature='grams'" in message
    assert "'diagonal'" in message
    assert "did you mean 'gram'?" in message


@pytest.mark.parametrize(("asked", "meant"), [("infuence", "influence"), ("Grad-Dot", "grad_dot")])
def test_a_misspelt_recipe_is_answered_with_the_nearest_name(asked, meant):
    with pytest.raises(RecipeError, match=f"did you mean '{meant}'"):
        get_recipe(asked)


@pytest.mark.parametrize("asked", ["xyzzy", 3, None, []])
def test_what_is_no_recipe_is_answered_with_all_names(asked):
    with pytest.raises(RecipeError, match="grad_dot, grad_cos, tracin, less, trak, d_trak"):
        get_recipe(asked)


def test_recipes_can_be_listed_without_loading_torch():
    code = "import sys, tda.recipes; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_misspelt_name_is_told_of_auto_too():
    with pytest.raises(RecipeError) as caught:
        recipe_for(None, "aut")
    assert "one of auto, " in caught.value.wanted and "'auto'" in caught.value.do
