"""The recipe: read, checked and resolved in one place."""

from pipeline.recipe.loader import load_recipe, recipe_to_yaml
from pipeline.recipe.problems import RecipeError
from pipeline.recipe.schema import Recipe

__all__ = ["Recipe", "RecipeError", "load_recipe", "recipe_to_yaml"]
