"""Compute which towers can be swapped for which: `python -m anyvlm.compatibility.swaps`, or `make swaps`.

Random ordered pairs of the vision types that the table of compatibility says work: the first is in a trained model, the
second takes its place.
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

from .journal import MEASURED_CODE, Journal, source_hash, versions
from .pair_checks import FAILS, WORKS
from .plan import Pair, Result
from .progress import COLOURS, Counting, kept, print_result
from .swap_checks import SEPARATOR, USUAL, check_swap, join_name, joined_models
from .swap_table import make_swap_table, swaps_to_markdown
from .table import read_table, write_files


#: Code whose change makes earlier measurements worthless.
SWAP_CODE = (*MEASURED_CODE, "swapping", "compatibility/fresh_logits.py", "compatibility/swap_checks.py")
#: One in so many checkpoints is loaded in a new process too.
FRESH_EVERY = 30


def draw_swaps(table: Mapping[str, Any], count: int, seed: int) -> list[Pair]:
    """`count` random swaps of types that work by the table of compatibility: old type, language model type, and `"new type /
    projector / fusion / views"`, the last three as usual in every other one."""
    vision, text = (
        [name for name, row in table[kind].items() if row["status"] == WORKS] for kind in ("vision", "text")
    )
    generator = random.Random(seed)
    pairs = [(old, new) for old in vision for new in vision if old != new]
    pairs = generator.sample(pairs, min(count, len(pairs)))
    usual, joins = join_name(*USUAL), joined_models()
    return [
        (old, generator.choice(text), SEPARATOR.join((new, generator.choice(joins) if number % 2 else usual)))
        for number, (old, new) in enumerate(pairs)
    ]


def main(
    workers: Annotated[int, typer.Option(min=1, help="Processes at a time.")] = os.cpu_count() or 1,
    timeout: Annotated[float, typer.Option(min=1, help="Seconds after which a swap is given up.")] = 180,
    memory: Annotated[float, typer.Option(min=0, help="GiB that the process of a swap may hold; 0: no limit.")] = 6,
    seed: Annotated[int, typer.Option(help="For the weights of tiny models and for which swaps are drawn.")] = 0,
    pairs: Annotated[int, typer.Option(min=1, help="Random ordered pairs of tower types.")] = 300,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Of these, measure only swaps with this type or way of joining, and write no table."),
    ] = None,
    fresh: Annotated[bool, typer.Option("--fresh", help="Forget what an earlier run measured.")] = False,
    output: Annotated[Path, typer.Option(help="Folder of the table of compatibility, and for this one.")] = Path(
        "docs"
    ),
    journal: Annotated[Path, typer.Option(help="File that keeps what was measured so far.")] = Path(
        "out/swaps/journal.jsonl"
    ),
) -> None:
    """Measure which vision towers can be swapped for which, and write the table.

    Each swap runs its checks in a process of its own, on a tiny model with random weights; or it is refused, and then what
    the reason names is tried. A run that was stopped goes on where it was.

    The exit code is 1 if a swap is made and then fails a check, or is refused without a way out.

    Examples:

    \b
      python -m anyvlm.compatibility.swaps
      python -m anyvlm.compatibility.swaps --pairs 3000 --only qwen2_vl_vision
      python -m anyvlm.compatibility.swaps --pairs 20 --seed 7 --output out/swaps --journal out/swaps.jsonl
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
    drawn = draw_swaps(compatibility, pairs, seed)
    in_fresh_process = set(drawn[::FRESH_EVERY])
    if only:
        drawn = [swap for swap in drawn if set(only) & {*swap, *swap[2].split(SEPARATOR)}]
        if not drawn:
            raise typer.BadParameter(f"None of {pairs} swaps has {' or '.join(only)}.", param_hint="only")
        journal = journal.with_name(f"only-{os.getpid()}-{journal.name}")

    def check(vision: str, text: str, combination: str) -> Result:
        return check_swap(vision, text, combination, seed, (vision, text, combination) in in_fresh_process).to_dict()

    records = Journal(journal, {"versions": versions(), "seed": seed, "source": source_hash(code=SWAP_CODE)}, fresh)
    if records.results:
        console.print(f"{len(records.results)} results of an earlier run are kept ({journal}); --fresh measures anew.")
    with kept(records, console, temporary=bool(only)), Counting(console) as counting:
        limit = int(memory * 2**30) or None
        results = counting.measure("swaps", drawn, records, check, workers, timeout, limit)
    failing = [result for result in results.values() if result["status"] == FAILS]
    for result in results.values() if only else failing:
        print_result(console, result)
    if not only:
        table = make_swap_table({"versions": versions(), "seed": seed}, list(results.values()))
        paths = write_files(output, "swaps", table, swaps_to_markdown(table))
        counts = ", ".join(f"{table['counts'][status]} {status}" for status in COLOURS)
        console.print(f"{len(results)} swaps: {counts}", highlight=False)
        console.print(f"Written: {', '.join(map(str, paths))}", highlight=False)
    raise typer.Exit(bool(failing))


if __name__ == "__main__":
    typer.run(main)
