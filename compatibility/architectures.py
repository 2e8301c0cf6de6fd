"""Compute the table of native families: `python -m anyvlm.compatibility.architectures`, or `make architectures`."""

import json
import os
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .native_cases import native_cases
from .native_checks import KINDS, NEW_TOKENS, SEEDS, TOLERANCE, CaseResult, check_case


JSON_NAME, MARKDOWN_NAME = "architectures.json", "architectures.md"

#: The table stands between these lines of the document; what is around them is written by hand.
_BEGIN, _END = "<!-- table: begin -->", "<!-- table: end -->"


def main(
    only: Annotated[
        list[str] | None,
        typer.Option(help="Check cases whose name begins so, and write no table. May be given several times."),
    ] = None,
    output: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("docs"),
) -> None:
    """Import tiny models of every native family of transformers, compare each with its native class, write the table.

    The exit code is 1 if anything differs. What differs is printed.

    Examples:

    \b
      python -m anyvlm.compatibility.architectures
      python -m anyvlm.compatibility.architectures --only llava --only internvl
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    torch.set_num_threads(1)
    console = Console(stderr=True)
    cases = [case for case in native_cases() if not only or case.name.startswith(tuple(only))]
    if not cases:
        raise typer.BadParameter(
            f"no case begins so; there are: {', '.join(map(str, native_cases()))}.", param_hint="--only"
        )
    results = []
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=console, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=len(cases))
        for case in cases:
            progress.update(task, description=case.name)
            result = check_case(case, SEEDS)
            results.append((case, result))
            for problem in result.problems:
                console.print(f"[red]{case.name}: {problem}", highlight=False)
            progress.advance(task)
    table = make_table([(case.note, result) for case, result in results])
    if only:
        console.print("\n".join(_lines(table)), markup=False, highlight=False)
    else:
        write_table(table, output)
        console.print(f"{len(results)} cases; wrote {output / MARKDOWN_NAME} and {output / JSON_NAME}")
    if not all(result.passed for _, result in results):
        raise typer.Exit(1)


def make_table(results: list[tuple[str, CaseResult]]) -> dict[str, Any]:
    """Everything that is written, without anything that changes from run to run."""
    return {
        "versions": {"torch": torch.__version__.split("+")[0], "transformers": transformers.__version__},
        "seeds": list(SEEDS),
        "tolerance": TOLERANCE,
        "new_tokens": NEW_TOKENS,
        "cases": [
            {
                "name": result.name,
                "class": result.model_class,
                "differences": {kind: result.differences.get(kind) for kind in KINDS},
                "greedy": result.greedy,
                "processor": result.processor,
                "to_native": result.to_native,
                "problems": result.problems,
                "note": note,
            }
            for note, result in results
        ],
    }


def write_table(table: dict[str, Any], folder: Path) -> None:
    """Write both files, each aside and then renamed; in the document, what stands between its two marks.

    Raises:
        ValueError: the document there has lost its marks.
    """
    folder.mkdir(parents=True, exist_ok=True)
    document = folder / MARKDOWN_NAME
    text = document.read_text(encoding="utf-8") if document.is_file() else f"# Architectures\n\n{_BEGIN}\n{_END}\n"
    before, begin, rest = text.partition(_BEGIN)
    _, end, after = rest.partition(_END)
    if not begin or not end:
        raise ValueError(f"{document} has not the lines {_BEGIN} and {_END}, between which the table goes.")
    _write(document, "\n".join([before + begin, "", *_lines(table), "", end + after]))
    _write(folder / JSON_NAME, json.dumps(table, indent=1, ensure_ascii=False) + "\n")


def _lines(table: dict[str, Any]) -> list[str]:
    versions = table["versions"]
    lines = [
        f"torch {versions['torch']}, transformers {versions['transformers']}, fp32 on a CPU, seeds "
        f"{', '.join(map(str, table['seeds']))}.",
        "",
        f"| Family | Class | {' | '.join(KINDS)} | greedy | processor | back |",
        f"|---|---|{'---:|' * len(KINDS)}---|---|---|",
    ]
    for case in table["cases"]:
        differences = [_number(case["differences"][kind]) for kind in KINDS]
        checks = ["yes" if case[key] else "**no**" for key in ("greedy", "processor", "to_native")]
        name = case["name"] + (f" ({case['note']})" if case["note"] else "")
        lines.append(f"| {' | '.join([name, '`' + case['class'] + '`', *differences, *checks])} |")
    return lines


def _number(difference: float | None) -> str:
    return "" if difference is None else "0" if difference == 0 else f"{difference:.1e}"


def _write(path: Path, text: str) -> None:
    aside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    aside.write_text(text, encoding="utf-8")
    os.replace(aside, path)


if __name__ == "__main__":
    typer.run(main)
