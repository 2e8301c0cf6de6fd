"""Compute the table of compatibility: `python -m anyvlm.compatibility.run`, or `make matrix`."""

import os
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from rich.console import Console

from . import tiny_configs
from .journal import Journal, source_hash, versions
from .pair_checks import FAILS, check_pair
from .plan import LANGUAGE_MODEL, TOWER, Result, random_pairs, type_pairs, working_types
from .progress import COLOURS, Counting, kept, print_result
from .table import JSON_NAME, MARKDOWN_NAME, make_table, write_table


def main(
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = os.cpu_count() or 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a pair is given up.")] = 120,
    memory: Annotated[float, typer.Option(min=0, help="GiB that the process of a pair may hold; 0: no limit.")] = 6,
    seed: Annotated[
        int, typer.Option(help="For the weights of tiny models and for which random pairs are drawn.")
    ] = 0,
    pairs: Annotated[int, typer.Option(min=0, help="Random pairs of types that work.")] = 300,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure this type alone, anew, and write no table. May be given several times."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run measured.")] = False,
    output: Annotated[Path, typer.Option(help="Folder for the table.")] = Path("docs"),
    journal: Annotated[Path, typer.Option(help="File that keeps what was measured so far.")] = Path(
        "out/matrix/journal.jsonl"
    ),
) -> None:
    """Measure which vision towers and language models of transformers can be composed, and write the table.

    Every vision type is composed with one language model, every language model type with one tower, then random pairs
    of types that work, all tiny and with random weights. Each pair runs eight checks in a process of its own; one that
    takes too long, takes too much memory or crashes is recorded as failing.

    A run that was stopped goes on where it was: what was measured is kept in the journal, as long as the versions, the
    seed and the code that is measured stay the same.

    The exit code is 1 if a type is composed and then fails a check: each should work, or be refused with a reason.

    Examples:

    \b
      python -m anyvlm.compatibility.run
      python -m anyvlm.compatibility.run --only qwen2_vl_vision --only mamba
      python -m anyvlm.compatibility.run --pairs 20 --seed 7 --output out/table --journal out/pairs.jsonl
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A forked process must not inherit threads, and a tiny model is faster on one.
    torch.set_num_threads(1)
    limit = int(memory * 2**30) or None
    console = Console(stderr=True)
    vision_types, text_types = tiny_configs.vision_types(), tiny_configs.text_types()

    def check(vision: str, text: str) -> Result:
        return check_pair(vision, text, seed).to_dict()

    if only:
        unknown = sorted(set(only) - {*vision_types, *text_types})
        if unknown:
            raise typer.BadParameter(f"transformers has no type {', '.join(unknown)}.", param_hint="only")
        vision_types = [name for name in vision_types if name in only]
        text_types = [name for name in text_types if name in only]
        journal = journal.with_name(f"only-{os.getpid()}-{journal.name}")

    records = Journal(journal, {"versions": versions(), "seed": seed, "source": source_hash()}, fresh)
    resumed = len(records.results)
    if resumed:
        console.print(f"{resumed} results of an earlier run are kept ({journal}); --fresh measures them anew.")
    with kept(records, console, temporary=bool(only)), Counting(console) as counting:
        results = counting.measure(
            "types", type_pairs(vision_types, text_types), records, check, workers, timeout, limit
        )
        drawn = [] if only else random_pairs(*working_types(results), pairs, seed)
        drawn_results = counting.measure("random pairs", drawn, records, check, workers, timeout, limit)

    failing = [result for result in results.values() if result["status"] == FAILS]
    if only:
        for result in results.values():
            print_result(console, result)
        raise typer.Exit(bool(failing))
    table = make_table(
        {"versions": versions(), "seed": seed, "with_vision": TOWER, "with_text": LANGUAGE_MODEL},
        {vision: results[vision, LANGUAGE_MODEL] for vision in vision_types},
        {text: results[TOWER, text] for text in text_types},
        list(drawn_results.values()),
    )
    write_table(table, output)
    for kind, label in (("vision", "vision types"), ("text", "language model types"), ("pairs", "random pairs")):
        counts = table["counts"][kind]
        parts = ", ".join(f"{counts[status]} {status}" for status in COLOURS)
        console.print(f"{counts['tried']} {label}: {parts}", highlight=False)
    for result in [*failing, *(result for result in drawn_results.values() if result["status"] == FAILS)]:
        print_result(console, result)
    console.print(f"Written: {output / MARKDOWN_NAME}, {output / JSON_NAME}", highlight=False)
    raise typer.Exit(bool(failing))


if __name__ == "__main__":
    typer.run(main)
