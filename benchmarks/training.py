"""Compare training with `Trainer`: transformers' LLaVA, ours, ours packed, ours with cached features; same weights and data.

    python benchmarks/training.py

`docs/training_speed.md` says what is measured, how, and how to read the numbers.
"""

import gc
import json
import tempfile
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from llava_pair import Sizes
from measure import CLOCKS, in_fresh_process, ratio_of, seconds_of
from parity import Clock, Precision, Setting, environment
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from training_sides import SIDES, Comparison, Side, compose_for, make_samples, make_sides, peak_memory, quick
from turns import Turns, losses, release


#: Losses of a step may differ by as much.
LOSS_LIMIT = 1e-5

_LARGE = Sizes(hidden_size=512, num_layers=8, num_heads=8, image_size=224, batch_size=4)

COMPARISONS = {
    "vocabulary": Comparison(
        name="a vocabulary of 151,000",
        side="ours",
        target=0.7,
        sides=("native", "ours"),
        sizes=_LARGE,
        vocab_size=151_000,
        lengths=(320, 320),
        answer_share=0.25,
    ),
    "ragged": Comparison(
        name="lengths from 32 to 1,024",
        side="packing",
        target=0.5,
        sides=("native", "ours", "packing"),
        sizes=Sizes(hidden_size=384, num_layers=6, num_heads=6, image_size=56, batch_size=8),
        vocab_size=32_000,
        lengths=(32, 1024),
        answer_share=0.5,
    ),
    "frozen": Comparison(
        name="a frozen tower of the LM's size",
        side="cache",
        target=0.35,
        sides=("native", "ours", "cache"),
        sizes=_LARGE,
        vocab_size=151_000,
        lengths=(320, 320),
        answer_share=0.25,
        frozen_tower=True,
    ),
}

Name = Enum("Name", {name: name for name in COMPARISONS}, type=str)


def main(
    only: Annotated[
        list[Name] | None, typer.Option(help="This comparison alone; may be given several times. Default: all.")
    ] = None,
    steps: Annotated[int, typer.Option(min=2, help="Steps of an epoch; those of the second epoch are timed.")] = 4,
    quick_run: Annotated[
        bool, typer.Option("--quick", help="Toy models and 2 steps: does it run, are losses equal?")
    ] = False,
    memory: Annotated[bool, typer.Option(help="Measure peak memory too, each side in a process of its own.")] = True,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[Precision, typer.Option(help="Of the weights.")] = Precision.float32,
    threads: Annotated[int, typer.Option(help="Threads on the CPU; 0: as torch chooses.")] = 0,
    clock: Annotated[
        Clock,
        typer.Option(help="process: CPU time of this process, steadier where others run; take --threads 1 with it."),
    ] = Clock.wall,
    scale: Annotated[int, typer.Option(min=1, help="Widths of the models, times this (for accelerators).")] = 1,
    seed: Annotated[int, typer.Option(help="For weights and samples.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write everything that was measured to this JSON file.")] = None,
    markdown: Annotated[Path | None, typer.Option(help="Write the table as Markdown to this file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a target or equality is missed.")] = False,
) -> None:
    """Compare training steps of transformers' own LLaVA class with those of a model composed by anyvlm, by HF Trainer.

    Weights, samples and their order are equal, and so must be the losses. Three comparisons, each with its own models:

    \b
      vocabulary  all is trained, 151,000 tokens in the vocabulary, a quarter of the words supervised
      ragged      samples of 32 to 1,024 tokens: LLaVA pads them, packing does not
      frozen      the tower is frozen on all sides, and its features cached on ours from the second epoch

    The training loops run in turn, step by step, in one process; times are of the second epoch, with reading and collating.
    Times are those of this machine now. The ratios hold if nothing else runs.

    Examples:

    \b
      python benchmarks/training.py --output training.json --markdown training.md
      python benchmarks/training.py --only ragged --steps 8
      python benchmarks/training.py --clock process --threads 1 --no-memory
      python benchmarks/training.py --device cuda --scale 4
    """
    console = Console()
    transformers.logging.set_verbosity_error()
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here; use --device cpu.", param_hint="device")
    if quick_run:
        steps, threads = 2, threads or 1
    if threads:
        torch.set_num_threads(threads)
    setting = Setting(torch.device(device), getattr(torch, dtype.value), seed, CLOCKS[clock.value])
    report = {"environment": environment(setting, clock.value) | {"steps of an epoch": steps}, "comparisons": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name in [choice.value for choice in only or list(Name)]:
            comparison = _scaled(COMPARISONS[name], scale)
            comparison = quick(comparison) if quick_run else comparison
            task = progress.add_task(name, total=len(comparison.sides) * (2 * steps + memory))

            def tick(task=task):
                progress.advance(task)

            report["comparisons"][name] = compare(comparison, setting, steps, memory, tick)
    report["passed"] = all(line["passed"] for line in report["comparisons"].values())
    show(report, console)
    if quick_run:
        console.print("[dim]The targets are meant for the default sizes; a toy model is all overhead.[/dim]")
    for path, text in ((output, json.dumps(report, indent=2) + "\n"), (markdown, as_markdown(report))):
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text, encoding="utf-8")
            console.print(f"Written to {path}.")
    if check and not report["passed"]:
        raise typer.Exit(1)


def _scaled(comparison: Comparison, scale: int) -> Comparison:
    sizes = comparison.sizes
    sizes = replace(sizes, hidden_size=scale * sizes.hidden_size, num_heads=scale * sizes.num_heads)
    return replace(comparison, sizes=sizes)


def compare(comparison: Comparison, setting: Setting, steps: int, memory: bool, tick) -> dict:
    """One comparison: step times and losses of all sides in turn, then the peak memory of each alone."""
    model, processor = compose_for(comparison, setting.dtype, setting.seed)
    samples = make_samples(comparison, processor, steps * comparison.sizes.batch_size, setting.seed)
    with tempfile.TemporaryDirectory() as directory:
        sides = make_sides(comparison, comparison.sides, model, processor, samples, setting.device, directory)
        filling = sum(_fill(side, samples, setting) for side in sides if side.name == "cache")
        trainers = [side.trainer(samples, 2, comparison.sizes, setting.device) for side in sides]
        seconds = Turns(trainers, setting.clock, tick).run()
        lines = {side.name: {"seconds": times[steps:]} for side, times in zip(sides, seconds)}
        for side, trainer in zip(sides, trainers):
            lines[side.name]["losses"] = losses(trainer)
            if side.name == "cache":
                lines[side.name] |= {"filling_seconds": filling, "bytes_on_disk": side.collator.feature_cache.size()}
            release(trainer)
            side.model = None
    del model, sides, trainers
    gc.collect()
    native = lines["native"]
    for name, line in lines.items():
        line["loss_difference"] = max(abs(a - b) for a, b in zip(line["losses"], native["losses"], strict=True))
        if name != "native":
            ratio = ratio_of(line["seconds"], native["seconds"])
            line |= {"ratio": ratio.median, "quartiles": ratio.quartiles, "interval": ratio.interval}
        line["seconds_of_step"] = sum(line["seconds"]) / steps
        if memory:
            arguments = (setting.dtype, setting.device, setting.seed, torch.get_num_threads())
            line["memory"] = asdict(in_fresh_process(peak_memory, comparison, name, *arguments))
            line["peak_bytes"] = line["memory"]["peak"] - line["memory"]["libraries"]
            tick()
    ours = lines[comparison.side]
    equal = all(line["loss_difference"] <= LOSS_LIMIT for line in lines.values())
    return {
        "name": comparison.name,
        "setting": asdict(comparison),
        "sides": lines,
        "ratio": ours["ratio"],
        "target": comparison.target,
        "equal_losses": equal,
        "passed": equal and ours["ratio"] <= comparison.target,
    }


def _fill(side: Side, samples: list, setting: Setting) -> float:
    """Seconds. The trainer would do it before its first step, where it could not be told from that."""
    cache = side.collator.feature_cache
    return seconds_of(lambda: cache.fill(samples, side.model, progress=False), setting.device, setting.clock)


def _rows(report: dict) -> list[tuple[str, ...]]:
    rows = []
    for found in report["comparisons"].values():
        native = found["sides"]["native"]
        for name, line in found["sides"].items():
            has_target = name == found["setting"]["side"]
            memory = memory_ratio = ""
            if "peak_bytes" in line:
                memory = f"{line['peak_bytes'] / 2**20:,.0f} MiB"
                memory_ratio = f"{line['peak_bytes'] / native['peak_bytes']:.2f}"
            is_native = name == "native"
            rows.append(
                (
                    found["name"] if is_native else "",
                    SIDES[name],
                    f"{line['seconds_of_step']:.2f} s",
                    "" if is_native else "{:.3f} ({:.3f}-{:.3f})".format(line["ratio"], *line["quartiles"]),
                    f"≤ {found['target']}" if has_target else "",
                    memory,
                    "" if is_native else memory_ratio,
                    "" if is_native else f"{line['loss_difference']:.1e}",
                )
            )
    return rows


_COLUMNS = ("comparison", "", "step", "ratio (quartiles)", "target", "peak memory", "ratio", "loss differs by")


def show(report: dict, console: Console) -> None:
    """Print the report as a table."""
    console.print(", ".join(f"{name} [bold]{value}[/bold]" for name, value in report["environment"].items()))
    table = Table(*_COLUMNS, box=box.SIMPLE_HEAD, pad_edge=False)
    for row in _rows(report):
        table.add_row(*row)
    console.print(table)
    for found in report["comparisons"].values():
        verdict = "[green]passed[/green]" if found["passed"] else "[red]missed[/red]"
        equal = "" if found["equal_losses"] else f", losses differ by more than {LOSS_LIMIT}"
        console.print(f"{found['name']}: {found['ratio']:.3f} (target ≤ {found['target']}){equal} {verdict}")
        cache = found["sides"].get("cache")
        if cache:
            epoch = sum(found["sides"]["native"]["seconds"])
            console.print(
                f"Filling the cache took {cache['filling_seconds'] / epoch:.2f} of native's epoch, once, and "
                f"{cache['bytes_on_disk'] / 2**20:,.1f} MiB on disk."
            )


def as_markdown(report: dict) -> str:
    """The table, for a page of the documentation."""
    lines = ["| " + " | ".join(_COLUMNS) + " |", "|" + "---|" * len(_COLUMNS)]
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in _rows(report))]) + "\n"


if __name__ == "__main__":
    typer.run(main)
