"""The table of compatibility: from results of pairs to `docs/compatibility.json` and `docs/compatibility.md`."""

import json
import os
from collections import Counter
from pathlib import Path
from typing import Any

from .pair_checks import CHECKS, FAILS, MARKS, NOT_TRIED, REFUSED, WORKS


JSON_NAME = "compatibility.json"
MARKDOWN_NAME = "compatibility.md"
_STATUSES = (WORKS, REFUSED, NOT_TRIED, FAILS)

Result = dict[str, Any]


def make_table(
    header: dict[str, Any],
    vision: dict[str, Result],
    text: dict[str, Result],
    pairs: list[Result],
) -> dict[str, Any]:
    """The whole table, sorted, without anything that changes from run to run.

    Args:
        header: Versions, seed, and the parts that types were measured with.
        vision: Vision type -> result with the fixed language model.
        text: Language model type -> result with the fixed tower.
        pairs: Results of random pairs.
    """
    return {
        **header,
        "counts": {
            "vision": _count(vision.values()),
            "text": _count(text.values()),
            "pairs": _count(pairs),
        },
        "vision": {name: _row(vision[name], "vision") for name in sorted(vision)},
        "text": {name: _row(text[name], "text") for name in sorted(text)},
        "pairs": [
            {"vision": result["vision"], "text": result["text"], **_row(result, None)}
            for result in sorted(pairs, key=lambda result: (result["vision"], result["text"]))
        ],
    }


def _count(results) -> dict[str, int]:
    counts = Counter(result["status"] for result in results)
    return {"tried": sum(counts.values()), **{status: counts[status] for status in _STATUSES}}


def _row(result: Result, kind: str | None) -> Result:
    """What the table says of one result; of a type only what is about its own part."""
    row = {"status": result["status"], "reason": result["reason"], "marks": result["marks"]}
    if result["failed"]:
        row["failed"] = result["failed"]
    details = result["details"]
    if details and kind == "vision":
        row |= {key: details[key] for key in ("tokens", "inputs", "layout")}
    if details and kind:
        row["parameters"] = details["parameters"]["vision_tower" if kind == "vision" else "language_model"]
    return row


def write_table(table: dict[str, Any], folder: Path) -> None:
    """Write both files, each aside and then renamed."""
    write_files(folder, JSON_NAME.removesuffix(".json"), table, to_markdown(table))


def write_files(folder: Path, name: str, table: dict[str, Any], text: str) -> list[Path]:
    """Write `<name>.json` and `<name>.md`, each aside and then renamed; their paths."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{name}.json", folder / f"{name}.md"]
    for path, content in zip(paths, (json.dumps(table, indent=1, ensure_ascii=False) + "\n", text)):
        _write(path, content)
    return paths


def read_table(folder: Path) -> dict[str, Any] | None:
    path = folder / JSON_NAME
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else None


def _write(path: Path, content: str) -> None:
    aside = path.with_name(path.name + ".part")
    aside.write_text(content, encoding="utf-8")
    os.replace(aside, path)


def to_markdown(table: dict[str, Any]) -> str:
    """The table for people: counts first, then every type, every refusal with its reason, and the random pairs."""
    versions, counts = table["versions"], table["counts"]
    sections = [
        "# Compatibility",
        f"Computed by `make matrix` with transformers {versions['transformers']}, torch {versions['torch']} and anyvlm "
        f"{versions['anyvlm']}; never edited by hand. Each type was composed in a tiny form with random weights (seed "
        f"{table['seed']}): every vision type with `{table['with_text']}`, every language model type with "
        f"`{table['with_vision']}`, then random pairs of types that work.",
        markdown_rows(
            ["", "tried", *_STATUSES],
            [
                [label, counts[kind]["tried"], *(counts[kind][status] for status in _STATUSES)]
                for kind, label in (
                    ("vision", "vision types"),
                    ("text", "language model types"),
                    ("pairs", "random pairs"),
                )
            ],
        ),
        "A type *works* when it passes all of these:",
        "\n".join(f"{number}. {meaning}" for number, meaning in enumerate(CHECKS.values(), 1)),
        "It is *refused* when `anyvlm.compose` says, before anything is built, why it cannot be joined, and *not tried* "
        "when a library that transformers needs for it is not installed where the table was computed. None may be in "
        "between: a type that is composed and then fails a check is an error of anyvlm.",
        "## Marks",
        "What a type that works lacks of itself:",
        markdown_rows(["mark", "meaning", "types"], _marks(table)),
        "## Vision types",
        "Tokens are those of one picture of the tiny tower. *Inputs* is how the tower takes pictures, *features* how it "
        "gives them back.",
        markdown_rows(
            ["type", "status", "tokens", "inputs", "features", "marks"],
            [
                [
                    f"`{name}`",
                    row["status"],
                    row.get("tokens", ""),
                    row.get("inputs", ""),
                    row.get("layout", ""),
                    "; ".join(row["marks"]),
                ]
                for name, row in table["vision"].items()
            ],
        ),
        "## Language model types",
        markdown_rows(
            ["type", "status", "marks"],
            [[f"`{name}`", row["status"], "; ".join(row["marks"])] for name, row in table["text"].items()],
        ),
        "## Why not",
    ]
    for kind, label in (("vision", "Vision types"), ("text", "Language model types")):
        for status in (REFUSED, NOT_TRIED, FAILS):
            rows = {name: row for name, row in table[kind].items() if row["status"] == status}
            if rows:
                sections.append(f"### {label}: {status} ({len(rows)})")
                sections.append(
                    markdown_rows(["type", "reason"], [[f"`{name}`", row["reason"]] for name, row in rows.items()])
                )
    sections.append("## Random pairs")
    not_working = [pair for pair in table["pairs"] if pair["status"] != WORKS]
    sections.append(
        f"{counts['pairs'][WORKS]} of {counts['pairs']['tried']} random pairs of types that work pass all checks"
        + (":" if not not_working else "; these do not:")
        if table["pairs"]
        else "None were drawn."
    )
    if not_working:
        sections.append(
            markdown_rows(
                ["vision", "text", "status", "reason"],
                [[f"`{pair['vision']}`", f"`{pair['text']}`", pair["status"], pair["reason"]] for pair in not_working],
            )
        )
    if table["pairs"]:
        works = [f"`{pair['vision']}` + `{pair['text']}`" for pair in table["pairs"] if pair["status"] == WORKS]
        sections.append("<details><summary>Those that work</summary>\n\n" + ", ".join(works) + "\n\n</details>")
    return "\n\n".join(section for section in sections if section) + "\n"


def _marks(table: dict[str, Any]) -> list[list[Any]]:
    # The parts that types are measured with have no marks, so each mark is the type's own.
    marked = Counter(mark for kind in ("vision", "text") for row in table[kind].values() for mark in row["marks"])
    return [[mark, meaning, marked[mark]] for mark, meaning in MARKS.items()]


def markdown_rows(columns: list[str], rows: list[list[Any]]) -> str:
    def line(cells) -> str:
        return "| " + " | ".join(str(cell).replace("|", "\\|") for cell in cells) + " |"

    return "\n".join([line(columns), line("---" for _ in columns), *map(line, rows)])
