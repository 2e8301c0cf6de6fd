"""The computed table of what works, `docs/compatibility.json`, which `make matrix` writes.

Every row, by model type, has a `status` (`"works"`, `"refused"`, `"fails"` or `"not tried"`), a `reason`, and `marks`
for what a type that works lacks.
"""

import difflib
import json
from functools import cache
from importlib import resources


@cache
def compatibility_table() -> dict[str, dict]:
    """`{"vision": {model type: row}, "text": {…}}`; both empty where the table is not there."""
    file = resources.files(__package__.rpartition(".")[0]).joinpath("docs", "compatibility.json")
    table = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    return {kind: table.get(kind, {}) for kind in ("vision", "text")}


def table_row(kind: str, model_type: str) -> dict | None:
    """What was computed about a model type as `kind` `"vision"` or `"text"`; `None` if it was not."""
    row = compatibility_table()[kind].get(model_type)
    return None if row is None or row["status"] == "not tried" else row


def nearest_types(kind: str, model_type: str, count: int = 3) -> list[str]:
    """Model types that work and whose names differ by little, as those of one family do; empty if there are none."""
    working = [name for name, row in compatibility_table()[kind].items() if row["status"] == "works"]
    return difflib.get_close_matches(model_type, working, n=count, cutoff=0.75)
