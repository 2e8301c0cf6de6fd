"""Compute which projectors, fusions and views work together: `python -m anyvlm.compatibility.combinations`.

Every projector with every fusion and every way to cut pictures into views, each with random pairs of the types that the
table of compatibility says work; the checks are those of that table.
"""

import os
import random
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import transformers
import typer
from rich.console import Console

from . import tiny_configs
from .combination_table import SEPARATOR, combinations_to_markdown, make_combination_table
from .journal import Journal, source_hash, versions
from .pair_checks import FAILS, WORKS, check_pair
from .plan import Pair, Result, random_pairs
from .progress import COLOURS, Counting, kept, print_result
from .table import read_table, write_files


#: Name -> what `compose` gets. Tiny models, so tiny numbers of queries, heads and tiles.
PROJECTORS: dict[str, Any] = {
    "linear": "linear",
    "mlp": "mlp",
    "pixel_shuffle": {"type": "pixel_shuffle", "pad": True},
    "avg_pool": "avg_pool",
    "patch_merger": {"type": "patch_merger", "pad": True},
    "conv": "conv",
    "resampler": {"type": "resampler", "num_queries": 4},
    "qformer": {"type": "qformer", "num_queries": 4},
}
FUSIONS: dict[str, Any] = {"embed": "embed", "cross_attention": "cross_attention", "gated": "gated"}
VIEWS: dict[str, Any] = {
    "resize": "resize",
    "tiles (anyres)": {"type": "tiles", "layout": "anyres"},
    "tiles (dynamic)": {"type": "tiles", "layout": "dynamic", "max_tiles": 2},
    "slices": {"type": "slices", "max_slices": 2},
    "native": {"type": "native", "max_tokens": 16},
}


def combination_names() -> list[str]:
    """`"projector / fusion / views"` of every combination."""
    return [SEPARATOR.join((p, f, v)) for p in PROJECTORS for f in FUSIONS for v in VIEWS]


def compose_arguments(combination: str) -> dict[str, Any]:
    """What `compose` gets for a combination; the usual way of cutting pictures is left out."""
    projector, fusion, views = combination.split(SEPARATOR)
    return {"projector": PROJECTORS[projector], "fusion": FUSIONS[fusion], "views": VIEWS[views]}


def draw_pairs(table: Mapping[str, Any], combinations: list[str], count: int, seed: int) -> list[Pair]:
    """`count` random pairs for each combination, of types that work by the table of compatibility."""
    working = [[name for name, row in table[kind].items() if row["status"] == WORKS] for kind in ("vision", "text")]
    return [
        (*pair, combination)
        for combination in combinations
        # Other pairs for each, but the same whatever other combinations there are.
        for pair in random_pairs(*working, count, random.Random(f"{seed} {combination}").randrange(2**32))
    ]


def check_combination(vision: str, text: str, combination: str, seed: int) -> Result:
    """The eight checks of one pair. Pictures are larger than the tower's and wide, so that there is something to cut."""
    edge = tiny_configs.picture_size(vision)
    return check_pair(
        vision,
        text,
        seed,
        combination,
        picture_size=(edge, 2 * edge),
        **compose_arguments(combination),
    ).to_dict()


def main(
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = os.cpu_count() or 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a pair is given up.")] = 120,
    memory: Annotated[float, typer.Option(min=0, help="GiB that the process of a pair may hold; 0: no limit.")] = 6,
    seed: Annotated[int, typer.Option(help="For the weights of tiny models and for which pairs are drawn.")] = 0,
    pairs: Annotated[int, typer.Option(min=1, help="Random pairs for each combination.")] = 10,
    only: Annotated[
        list[str] | None,
        typer.Option(
            help="Measure only combinations with this projector, fusion or views, or this whole one, and write no table."
        ),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run measured.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the table of compatibility, and for this one.")] = Path(
        "docs"
    ),
    journal: Annotated[Path, typer.Option(help="File that keeps what was measured so far.")] = Path(
        "out/combinations/journal.jsonl"
    ),
) -> None:
    """Measure which projectors, fusions and views work together, and write the table.

    Each combination is tried with random pairs of types that work by the table of compatibility (`make matrix`). A pair
    runs eight checks in a process of its own, or is refused when composed. A run that was stopped goes on where it was.

    The exit code is 1 if a pair is composed and then fails a check.

    Examples:

    \b
      python -m anyvlm.compatibility.combinations
      python -m anyvlm.compatibility.combinations --only cross_attention --pairs 3
      python -m anyvlm.compatibility.combinations --only "mlp / gated / slices" --seed 7
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    os.environ["HF_HUB_OFFLINE"] = "1"
    # A forked process must not inherit threads, and a tiny model is faster on one.
    torch.set_num_threads(1)
    console = Console(stderr=True)
    compatibility = read_table(output)
    if compatibility is None:
        raise typer.BadParameter(
            f"{output} has no table of compatibility. Run make matrix first.", param_hint="output"
        )
    names = combination_names()
    if only:
        known = {*names, *PROJECTORS, *FUSIONS, *VIEWS}
        unknown = sorted(set(only) - known)
        if unknown:
            choices = ", ".join([*PROJECTORS, *FUSIONS, *VIEWS])
            raise typer.BadParameter(f"Unknown: {', '.join(unknown)}. Choose of: {choices}.", param_hint="only")
        names = [name for name in names if set(only) & {name, *name.split(SEPARATOR)}]
        journal = journal.with_name(f"only-{os.getpid()}-{journal.name}")

    def check(vision: str, text: str, combination: str) -> Result:
        return check_combination(vision, text, combination, seed)

    records = Journal(journal, {"versions": versions(), "seed": seed, "source": source_hash()}, fresh)
    if records.results:
        console.print(f"{len(records.results)} results of an earlier run are kept ({journal}); --fresh measures anew.")
    with kept(records, console, temporary=bool(only)), Counting(console) as counting:
        drawn = draw_pairs(compatibility, names, pairs, seed)
        limit = int(memory * 2**30) or None
        results = counting.measure("combinations", drawn, records, check, workers, timeout, limit)
    failing = [result for result in results.values() if result["status"] == FAILS]
    for result in results.values() if only else failing:
        print_result(console, result)
    if not only:
        table = make_combination_table({"versions": versions(), "seed": seed, "pairs": pairs}, list(results.values()))
        paths = write_files(output, "combinations", table, combinations_to_markdown(table))
        counts = ", ".join(f"{table['counts'][status]} {status}" for status in COLOURS)
        console.print(f"{len(results)} pairs in {len(names)} combinations: {counts}", highlight=False)
        console.print(f"Written: {', '.join(map(str, paths))}", highlight=False)
    raise typer.Exit(bool(failing))


if __name__ == "__main__":
    typer.run(main)
