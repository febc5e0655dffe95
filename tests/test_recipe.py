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

PUBLISHED = {"grad_dot", "grad_cos", "tracin", "trak", "influence"}


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
    with pytest.raises(RecipeError, match="grad_dot, grad_cos, tracin, trak, influence"):
        get_recipe(asked)


def test_recipes_can_be_listed_without_loading_torch():
    code = "import sys, tda.recipes; sys.exit('torch' in sys.modules or 'numpy' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
