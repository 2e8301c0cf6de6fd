"""The table of swaps: from results to what `docs/swaps.json` and `docs/swaps.md` hold."""

from collections import Counter, defaultdict
from typing import Any

from .combination_table import SEPARATOR
from .pair_checks import FAILS, NOT_TRIED, REFUSED, WORKS
from .swap_checks import SWAP_CHECKS
from .table import markdown_rows


Result = dict[str, Any]

_STATUSES = (WORKS, REFUSED, NOT_TRIED, FAILS)
_KINDS = ("projector", "fusion", "views")


def make_swap_table(header: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """The whole table, sorted, without anything that changes from run to run.

    Args:
        header: Versions and seed.
        results: Of `check_swap`.
    """
    rows = [_row(result) for result in results]
    return {
        **header,
        "counts": _counts(rows),
        "swaps": sorted(rows, key=lambda row: (row["old"], row["new"], row["text"], row["join"])),
    }


def _row(result: Result) -> Result:
    new, join = result["combination"].split(SEPARATOR, 1)
    details = dict(result["details"])
    row = {"old": result["vision"], "new": new, "text": result["text"], "join": details.pop("join", join)}
    return {**row, **{key: result[key] for key in ("status", "reason")}, **details}


def _counts(rows: list[Result]) -> dict[str, int]:
    counts = Counter(row["status"] for row in rows)
    return {status: counts[status] for status in _STATUSES}


def swaps_to_markdown(table: dict[str, Any]) -> str:
    """The table for people: how many swaps work, what became of the projectors, and why the others are refused."""
    versions, counts, swaps = table["versions"], table["counts"], table["swaps"]
    works = [row for row in swaps if row["status"] == WORKS]
    sections = [
        "# Swaps",
        f"Computed by `make swaps` with transformers {versions['transformers']}, torch {versions['torch']} and anyvlm "
        f"{versions['anyvlm']}; never edited by hand. Each is a random ordered pair (seed {table['seed']}) of tower types "
        "that [work](compatibility.md), with a random language model type that works: a model with the first tower, tiny "
        "and every weight of it random, gets the second, without looking at pictures. Half of the models are joined by an "
        "mlp and get whole pictures, the others by a random projector, fusion and way of cutting pictures.",
        f"Of {len(swaps)} swaps, **{counts[WORKS]} work, {counts[REFUSED]} are refused** with the reason, and "
        f"{counts[FAILS]} fail. One works when it passes all of these:",
        "\n".join(f"{number}. {meaning}" for number, meaning in enumerate(SWAP_CHECKS.values(), 1)),
        "One that is refused was tried again with what its reason names, another projector or whole pictures, and passes "
        "the same checks then.",
        "## What became of the projectors",
        markdown_rows(
            ["of the swaps that work", "number"],
            [
                ["every tensor of the projector kept bit for bit", _number(works, projector="kept")],
                ["… of these behind a new map of features", _number(works, projector="kept", aligned_features=True)],
                ["all but the first layer's weight kept", _number(works, projector="first layer new")],
                ["features resampled, so that a picture keeps its tokens", _number(works, aligned_grid=True)],
                ["fitted in closed form, the old projector behind a map", _number(works, alignment="features")],
                ["fitted in closed form, the last layer too", _number(works, alignment="tokens")],
                ["not fitted: features that have no places in common, with the reason", _not_fitted(works)],
                ["a picture takes as many tokens as before", sum(len(set(row["tokens"])) == 1 for row in works)],
            ],
        ),
        "## How the models are joined",
        markdown_rows(["", "tried", *_STATUSES], _by_join(swaps)),
        "## Why not",
        _reasons(swaps),
        "## All",
        "<details><summary>Those that work</summary>\n\n"
        + markdown_rows(
            ["old", "new", "language model", "joined by", "tokens"],
            [
                [
                    f"`{row['old']}`",
                    f"`{row['new']}`",
                    f"`{row['text']}`",
                    row["join"],
                    " → ".join(map(str, row["tokens"])),
                ]
                for row in works
            ],
        )
        + "\n\n</details>",
    ]
    return "\n\n".join(sections) + "\n"


def _number(rows: list[Result], **values: Any) -> int:
    return sum(all(row.get(key) == value for key, value in values.items()) for row in rows)


def _not_fitted(rows: list[Result]) -> int:
    return sum(str(row.get("alignment")).startswith("none: ") for row in rows)


def _by_join(swaps: list[Result]) -> list[list[Any]]:
    by_part: dict[tuple[str, str], list[Result]] = defaultdict(list)
    for row in swaps:
        for kind, name in zip(_KINDS, row["join"].split(SEPARATOR)):
            by_part[kind, name].append(row)
    return [
        [f"{kind} `{name}`", len(rows), *_counts(rows).values()]
        for (kind, name), rows in sorted(by_part.items(), key=lambda item: (_KINDS.index(item[0][0]), item[0][1]))
    ]


def _reasons(swaps: list[Result]) -> str:
    reasons: dict[tuple[str, str], list[str]] = defaultdict(list)
    for row in swaps:
        if row["status"] != WORKS:
            name = f"`{row['old']}` → `{row['new']}` ({row['text']}, {row['join']})"
            reasons[f"{row['status']}: {row['reason']}", _spoken(row.get("works_with", {}))].append(name)
    if not reasons:
        return "Every swap works."
    return markdown_rows(
        ["reason", "works with", "swaps", "such as"],
        [
            [reason, way_out, len(names), names[0]]
            for (reason, way_out), names in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
        ],
    )


def _spoken(arguments: dict[str, Any]) -> str:
    return ", ".join(f"`{name}={value!r}`" for name, value in arguments.items())
