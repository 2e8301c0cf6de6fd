"""Recipes: YAML files that say what is trained, in which stages, on which data, at which rates, with which losses.

`train_recipe(load_recipe("recipe.yaml"))`, or `anyvlm train recipe.yaml`.
"""

from .model_checks import plan
from .run import train_recipe
from .validation import load_recipe
from .yaml_file import RecipeError


__all__ = ["RecipeError", "load_recipe", "plan", "train_recipe"]
