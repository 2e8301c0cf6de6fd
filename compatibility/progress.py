"""What a long run shows while it goes on, and how a result is printed."""

from collections.abc import Iterator
from contextlib import contextmanager

import typer
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from .journal import Journal
from .pair_checks import FAILS, NOT_TRIED, REFUSED, WORKS
from .plan import Result, measure


COLOURS = {WORKS: "green", REFUSED: "yellow", NOT_TRIED: "yellow", FAILS: "red"}


class Counting:
    """A progress bar that counts what works, is refused and fails.

    It is drawn when a result comes, not by a thread: processes are forked while it is there.
    """

    def __init__(self, console: Console):
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[counts]}"),
            TimeElapsedColumn(),
        )
        self.progress = Progress(*columns, console=console, auto_refresh=False)

    def __enter__(self):
        self.progress.start()
        return self

    def __exit__(self, *exc_info):
        self.progress.stop()

    def measure(self, label: str, pairs, records, check, workers, timeout, limit):
        bar = self.progress.add_task(label, total=len(pairs), counts="")
        counts = dict.fromkeys(COLOURS, 0)

        def count(result: Result) -> None:
            counts[result["status"]] += 1
            text = " ".join(f"[{colour}]{counts[status]} {status}[/]" for status, colour in COLOURS.items())
            self.progress.update(bar, advance=1, counts=text, refresh=True)

        return measure(pairs, records, check, workers, timeout, limit, count)


@contextmanager
def kept(records: Journal, console: Console, temporary: bool = False) -> Iterator[None]:
    """Close the journal in any case; on Ctrl-C say where it is and exit with 130.

    Args:
        temporary: The journal is of a few pairs measured anew, and removed.
    """
    try:
        yield
    except KeyboardInterrupt:
        console.print(f"Stopped. What was measured is kept in {records.path}; run the same command again to go on.")
        raise typer.Exit(130) from None
    finally:
        records.close()
        if temporary:
            records.path.unlink()


def print_result(console: Console, result: Result) -> None:
    name = f"{result['vision']} + {result['text']}" + (f" ({result['combination']})" if result["combination"] else "")
    console.print(f"{name}: {result['status']}", style=COLOURS[result["status"]], highlight=False, markup=False)
    lines = [result["reason"]] if result["reason"] and not result["failed"] else []
    lines += [f"{check}: {found}" for check, found in result["failed"].items()]
    lines += [f"mark: {mark}" for mark in result["marks"]]
    if result["status"] == WORKS:
        lines += [f"{key}: {value}" for key, value in result["details"].items()]
    for line in lines:
        console.print(f"  {line}", highlight=False, markup=False, soft_wrap=True)
