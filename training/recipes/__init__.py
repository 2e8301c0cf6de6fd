"""Recipes: a training in stages, written in YAML, checked before anything runs."""
