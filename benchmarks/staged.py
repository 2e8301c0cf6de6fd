"""Two stages against one, and unfreezing a swapped tower in stages against leaving it frozen; on real pictures, over seeds.

    python benchmarks/staged.py --models ../shared/models --output runs/staged

A model of ResNet-50 and stories-15m learns to name pictures of Fashion-MNIST:

- in two stages: the new projector first and alone, then projector and language model;
- in a single stage: both at once, from a new projector.

Then DINOv2-S takes the tower's place in the model of two stages (`anyvlm.swap`, fitted in closed form on 100 of the
training pictures), which it sees in 28 pixels, a size that it was not made for; and what is learned next is

- the projector alone, the tower frozen;
- the same, and in stages the tower's last 4 layers (of those that are read) and then all of them, lower ones slower.

Both sides of a comparison have the same start, the same pictures in the same number of steps, and the same rates to
choose from: all are tried for each with the first seed, on pictures held out for that; the best of each is then run over
the seeds, and asked about other pictures. An answer is exact if greedy decoding gives it to the last letter and ends
there.

`--models` is a folder with `dinov2-small`, `resnet-50` and `stories-15m`, each loadable with transformers. The pictures are
those of Debian's package dataset-fashion-mnist: found where it is installed, fetched with `apt-get download` otherwise, or
in `--data`. What is done is kept in `--output`, so a run that was stopped goes on.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.table import Table
from staged_training import Run, Stage, exact_answers, is_kept, keep, new_model, samples, swapped_model, train
from transformers.utils import logging


TITLES = {
    "stages": (
        "From a new projector",
        "single stage: projector and language model",
        "two stages: projector, then both",
    ),
    "tower": ("After the swap of the tower", "tower frozen", "tower unfrozen in stages"),
}
console = Console(stderr=True)


@dataclass(frozen=True)
class Rates:
    """What is tried: of the projector while it is new, and of what is trained beside it."""

    projector: float
    other: float


RATES = {
    "stages": (Rates(1e-3, 5e-5), Rates(1e-3, 1e-4), Rates(1e-3, 5e-4), Rates(2e-3, 5e-4)),
    "tower": (Rates(3e-4, 5e-5), Rates(1e-3, 2e-5), Rates(1e-3, 5e-5)),
}
#: Of the model whose tower is swapped.
SWAPPED = RATES["stages"][-1]


def stages_of(arm: str, rates: Rates, steps: int) -> list[Stage]:
    """The stages of each arm; both arms of a comparison have as many steps."""
    projector, both = {"projector": rates.projector}, {"projector": rates.projector, "language_model": rates.other}
    third = steps // 3
    if arm == "single":
        return [Stage(steps, both)]
    if arm == "two":
        return [Stage(third, projector), Stage(steps - third, both)]
    if arm == "frozen":
        return [Stage(third, projector), Stage(third, projector), Stage(steps - 2 * third, projector)]
    tower = {"learning_rate": rates.other, "layer_decay": 0.9}
    return [
        Stage(third, projector),
        Stage(third, {**projector, "vision_tower": {"train": "last 4 layers", **tower}}),
        Stage(steps - 2 * third, {**projector, "vision_tower": {"train": "all", **tower}}),
    ]


ARMS = {"stages": ("single", "two"), "tower": ("frozen", "unfrozen")}


def rates_of(comparison: str, arm: str) -> list[Rates]:
    """What is tried for an arm; where nothing is trained beside the projector, the other rate is 0."""
    return list(dict.fromkeys(Rates(one.projector, one.other * (arm != "frozen")) for one in RATES[comparison]))


def measure(run: Run, comparison: str, arm: str, seed: int, rates: Rates, choosing: bool = False) -> dict:
    """One training, with the shares of exact answers; what was measured before is read."""
    name = f"{comparison}-{arm}-{seed}-{rates.projector:g}-{rates.other:g}"
    kept = run.output / f"{name}.json"
    if kept.exists():
        return json.loads(kept.read_text())
    started, clock = time.monotonic(), time.process_time()
    if comparison == "tower":
        if not is_kept(run, seed):
            measure(run, "stages", "two", seed, SWAPPED, choosing)
        model, processor = swapped_model(run, seed)
        run = replace(run, steps=run.tower_steps)
    else:
        model, processor = new_model(run, seed)
    losses = train(run, model, processor, stages_of(arm, rates, run.steps), seed)
    if arm == "two" and rates == SWAPPED:
        keep(run, model, processor, seed)
    result = {
        "validation": exact_answers(model, processor, samples(run, "validation")) if choosing else None,
        "exact": exact_answers(model, processor, samples(run, "test")),
        "losses": losses,
        "seconds": time.monotonic() - started,
        "cpu_seconds": time.process_time() - clock,
    }
    kept.write_text(json.dumps(result) + "\n")
    console.print(f"{name}: {result['exact']:.1%} exact ({result['seconds']:.0f} s)")
    return result


def compare(run: Run, comparison: str, seeds: list[int]) -> dict:
    """The best rates of each arm, and each seed's share of exact answers with them."""
    found = {}
    for arm in ARMS[comparison]:
        tried = {
            rates: measure(run, comparison, arm, seeds[0], rates, choosing=True)["validation"]
            for rates in rates_of(comparison, arm)
        }
        best = max(tried, key=tried.get)
        found[arm] = {
            "tried": [{**asdict(rates), "exact": share} for rates, share in tried.items()],
            "rates": asdict(best),
            "exact": [measure(run, comparison, arm, seed, best)["exact"] for seed in seeds],
        }
    return found


def rows_of(comparison: str, found: dict, seeds: list[int]) -> list[list[str]]:
    """The table's rows: arm, rates, each seed, mean; and what the second arm is ahead."""
    rows = []
    for arm, title in zip(ARMS[comparison], TITLES[comparison][1:]):
        shares = [100 * share for share in found[arm]["exact"]]
        rates = found[arm]["rates"]
        chosen = f"{rates['projector']:g}" + ("" if arm == "frozen" else f", {rates['other']:g}")
        rows.append([title, chosen, *(f"{share:.1f}" for share in shares), f"{statistics.mean(shares):.1f}"])
    first, second = (found[arm]["exact"] for arm in ARMS[comparison])
    ahead = [100 * (after - before) for before, after in zip(first, second)]
    rows.append(["ahead, points", "", *(f"{one:+.1f}" for one in ahead), f"{statistics.mean(ahead):+.1f}"])
    return rows


def markdown(results: dict, seeds: list[int], run: dict) -> str:
    """The tables of a run, made of its JSON."""
    lines = []
    for comparison, found in results.items():
        head = [TITLES[comparison][0], "rates", *(f"seed {seed}" for seed in seeds), "mean"]
        lines += ["", f"| {' | '.join(head)} |", f"|{'---|' * len(head)}"]
        lines += [f"| {' | '.join(row)} |" for row in rows_of(comparison, found, seeds)]
        for arm, title in zip(ARMS[comparison], TITLES[comparison][1:]):
            tried = ", ".join(
                f"{one['projector']:g} and {one['other']:g}: {one['exact']:.1%}" for one in found[arm]["tried"]
            )
            lines += ["", f"Rates tried, {title}: {tried}."]
    head = (
        f"Exact answers in % about {run['test']:,} held-out pictures of Fashion-MNIST; {run['steps']} steps of "
        f"{run['batch_size']} pictures each from a new projector, {run['tower_steps']} after the swap."
    )
    return "\n".join([head, *lines]) + "\n"


def main(
    models: Annotated[Path, typer.Option(help="Folder with dinov2-small, resnet-50 and stories-15m.")],
    output: Annotated[Path, typer.Option(help="Where features, models and results are kept.")],
    data: Annotated[Path | None, typer.Option(help="Folder with the files of Fashion-MNIST.")] = None,
    seeds: Annotated[list[int], typer.Option(help="Seeds; give it once for each.")] = [0, 1, 2],  # noqa: B006
    comparisons: Annotated[list[str], typer.Option(help="stages, tower, or both.")] = ["stages", "tower"],  # noqa: B006
    steps: Annotated[int, typer.Option(help="Steps of each training with the first tower.")] = 160,
    tower_steps: Annotated[int, typer.Option(help="Steps of each training after the swap.")] = 480,
    batch_size: Annotated[int, typer.Option(help="Pictures of each step.")] = 8,
    test: Annotated[int, typer.Option(help="Held-out pictures that the models are asked about.")] = 500,
    threads: Annotated[int, typer.Option(help="Threads of torch; 0 for its own choice.")] = 0,
    quick: Annotated[bool, typer.Option(help="A few steps and pictures: does it run?")] = False,
) -> None:
    """Two stages against one; unfreezing a swapped tower in stages against leaving it frozen."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    if threads:
        torch.set_num_threads(threads)
    unknown = sorted(set(comparisons) - ARMS.keys())
    if unknown:
        raise typer.BadParameter(f"{', '.join(unknown)}: there are {' and '.join(ARMS)}.")
    if quick:
        steps, tower_steps, batch_size, test = 3, 3, 2, 4
    output.mkdir(parents=True, exist_ok=True)
    run = Run(models, output, data, steps, tower_steps, batch_size, test)
    started = time.monotonic()
    results = {comparison: compare(run, comparison, seeds) for comparison in comparisons}
    record = {
        "run": {
            "steps": steps,
            "tower_steps": tower_steps,
            "batch_size": batch_size,
            "test": test,
            "threads": torch.get_num_threads(),
        },
        "seeds": seeds,
        "seconds": time.monotonic() - started,
        "results": results,
    }
    (output / "staged.json").write_text(json.dumps(record, indent=2) + "\n")
    (output / "staged.md").write_text(markdown(results, seeds, record["run"]))
    for comparison, found in results.items():
        table = Table(TITLES[comparison][0], "rates", *(f"seed {seed}" for seed in seeds), "mean")
        for row in rows_of(comparison, found, seeds):
            table.add_row(*row)
        Console().print(table)


main.__doc__ = __doc__

if __name__ == "__main__":
    typer.run(main)
