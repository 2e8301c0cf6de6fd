"""The computed table of what works, `docs/compatibility.json`, which `make matrix` writes."""

import difflib
import json
from functools import cache
from importlib import resources


@cache
def compatibility_table() -> dict[str, dict]:
    """`{"vision": {model type: row}, "text": {…}}`; both empty where the table is not there."""
    file = resources.files("anyvlm").joinpath("docs", "compatibility.json")
    if not file.is_file():
        return {"vision": {}, "text": {}}
    table = json.loads(file.read_text(encoding="utf-8"))
    return {kind: table.get(kind, {}) for kind in ("vision", "text")}


def table_row(kind: str, model_type: str) -> dict | None:
    """What was computed about a model type as `kind` `"vision"` or `"text"`: its `status` and `reason`."""
    return compatibility_table()[kind].get(model_type)


def nearest_types(kind: str, model_type: str, count: int = 3) -> list[str]:
    """Model types that work and are named most alike; for a language model's family, its own forms come first."""
    working = [name for name, row in compatibility_table()[kind].items() if row["status"] == "works"]
    return difflib.get_close_matches(model_type, working, n=count, cutoff=0.6)
