"""The table of combinations: from results of pairs to what `docs/combinations.json` and `docs/combinations.md` hold."""

from collections import Counter, defaultdict
from typing import Any

from .pair_checks import CHECKS, FAILS, NOT_TRIED, REFUSED, WORKS
from .table import markdown_rows


SEPARATOR = " / "

Result = dict[str, Any]


def make_combination_table(header: dict[str, Any], results: list[Result]) -> dict[str, Any]:
    """The whole table, sorted, without anything that changes from run to run.

    Args:
        header: Versions, seed, and the number of pairs for each combination.
        results: Of pairs, each with its combination.
    """
    by_combination: dict[str, list[Result]] = defaultdict(list)
    for result in results:
        by_combination[result["combination"]].append(result)
    return {
        **header,
        "counts": _counts(results),
        "combinations": {
            name: {
                "counts": _counts(own),
                "pairs": [
                    {key: result[key] for key in ("vision", "text", "status", "reason")}
                    for result in sorted(own, key=lambda result: (result["vision"], result["text"]))
                ],
            }
            for name, own in sorted(by_combination.items())
        },
    }


def _counts(results: list[Result]) -> dict[str, int]:
    counts = Counter(result["status"] for result in results)
    return {status: counts[status] for status in (WORKS, REFUSED, NOT_TRIED, FAILS)}


def combinations_to_markdown(table: dict[str, Any]) -> str:
    """The table for people: how many pairs of each combination work, and why the others are refused."""
    versions, counts, rows = table["versions"], table["counts"], table["combinations"]
    names = [name.split(SEPARATOR) for name in rows]
    projectors = sorted({projector for projector, _, _ in names})
    columns = sorted({(fusion, views) for _, fusion, views in names})
    reasons: dict[str, list[str]] = defaultdict(list)
    for name, row in rows.items():
        for pair in row["pairs"]:
            if pair["status"] != WORKS:
                reasons[f"{pair['status']}: {pair['reason']}"].append(
                    f"`{pair['vision']}` + `{pair['text']}` ({name})"
                )
    sections = [
        "# Combinations",
        f"Computed by `make combinations` with transformers {versions['transformers']}, torch {versions['torch']} and "
        f"anyvlm {versions['anyvlm']}; never edited by hand. Every projector with every fusion and every way of cutting "
        f"pictures into views, each with {table['pairs']} random pairs (seed {table['seed']}) of the types that "
        "[work](compatibility.md), tiny and with random weights.",
        f"Of {sum(counts.values())} pairs, **{counts[WORKS]} work, {counts[REFUSED]} are refused** when composed, with "
        f"a reason, and {counts[FAILS]} fail. A pair works when it passes all of these:",
        "\n".join(f"{number}. {meaning}" for number, meaning in enumerate(CHECKS.values(), 1)),
        "For fusions other than `embed` no image token takes the place of a word's embedding; there the last check is that "
        "the fusion, closed, leaves the language model's own logits.",
        "Pairs that work, of those tried:",
        markdown_rows(
            ["fusion, views", *projectors],
            [
                [
                    f"{fusion}, {views}",
                    *(_share(rows.get(SEPARATOR.join((projector, fusion, views)))) for projector in projectors),
                ]
                for fusion, views in columns
            ],
        ),
        "## Why not",
        markdown_rows(
            ["reason", "pairs", "such as"],
            [
                [reason, len(pairs), pairs[0]]
                for reason, pairs in sorted(reasons.items(), key=lambda item: (-len(item[1]), item[0]))
            ],
        )
        if reasons
        else "Every pair works.",
    ]
    return "\n\n".join(sections) + "\n"


def _share(row: dict[str, Any] | None) -> str:
    return f"{row['counts'][WORKS]}/{sum(row['counts'].values())}" if row else ""
