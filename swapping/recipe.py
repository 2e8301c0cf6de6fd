"""What to train after a swap, and at which rates: a recipe of stages."""

import json
from typing import Any


def recipe_yaml(recipe: dict[str, Any]) -> str:
    """A recipe as YAML; without PyYAML as JSON, which is YAML too."""
    try:
        import yaml
    except ModuleNotFoundError:
        return json.dumps(recipe, indent=2) + "\n"
    return yaml.safe_dump(recipe, sort_keys=False, allow_unicode=True, width=110)
