"""Compare a composed model with `LlavaForConditionalGeneration`: same weights, same inputs, one run, taking turns.

    python benchmarks/parity.py

`benchmarks/README.md` says what is measured, how, and how to read the numbers.
"""

import gc
import json
import platform
from dataclasses import asdict, replace
from enum import Enum
from pathlib import Path
from typing import Annotated

import torch
import transformers
import typer
from costs import Setting, compare_inference, compare_memory, compare_training
from equality import check_equality
from family_costs import COSTS, QUICK_SCALE, TARGET, Scale, compare_family, family_cases
from llava_pair import QUICK_SIZES, Sizes, build_ours, build_pair, compose_ours
from measure import CLOCKS, WARMUP_PAIRS
from rich import box
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

import anyvlm


DEFAULTS = Sizes()


class Part(str, Enum):
    """A part of the comparison."""

    equality = "equality"
    prefill = "prefill"
    decoding = "decoding"
    training = "training"
    memory = "memory"


class Clock(str, Enum):
    """What times are read from."""

    wall = "wall"
    process = "process"


class Precision(str, Enum):
    """The dtype of weights."""

    float32 = "float32"
    bfloat16 = "bfloat16"


def main(
    only: Annotated[
        list[Part] | None, typer.Option(help="Run this part alone; may be given several times. Default: all.")
    ] = None,
    pairs: Annotated[int, typer.Option(min=1, help="Pairs of prefills and of generations that are timed.")] = 20,
    training_pairs: Annotated[int, typer.Option(min=1, help="Pairs of training steps that are timed.")] = 5,
    quick: Annotated[bool, typer.Option("--quick", help="A toy model and 3 pairs: does it run, is it equal?")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, cuda:1, …")] = "cpu",
    dtype: Annotated[Precision, typer.Option(help="For times and memory. Equality is checked in fp32.")] = "float32",
    threads: Annotated[int, typer.Option(help="Threads on the CPU; 0: as torch chooses.")] = 0,
    clock: Annotated[
        Clock,
        typer.Option(help="process: CPU time of this process, steadier where others run; take --threads 1 with it."),
    ] = "wall",
    hidden_size: Annotated[int, typer.Option(help="Width of the language model and of the tower.")] = (
        DEFAULTS.hidden_size
    ),
    num_layers: Annotated[int, typer.Option(help="Layers of each.")] = DEFAULTS.num_layers,
    image_size: Annotated[int, typer.Option(help="Edge of a picture in pixels; patches have 14.")] = (
        DEFAULTS.image_size
    ),
    batch_size: Annotated[int, typer.Option(help="Samples of a training step.")] = DEFAULTS.batch_size,
    answer_tokens: Annotated[int, typer.Option(help="Supervised tokens of a sample.")] = DEFAULTS.answer_tokens,
    untied: Annotated[bool, typer.Option("--untied", help="Embeddings and head are two matrices.")] = False,
    vocab_size: Annotated[int, typer.Option(help="Vocabulary for equality, prefill and decoding.")] = 32_000,
    training_vocab_size: Annotated[int, typer.Option(help="Vocabulary for the training step.")] = 151_000,
    families: Annotated[
        bool, typer.Option("--families", help="Every native family beside its own class, in place of LLaVA's parts.")
    ] = False,
    family: Annotated[
        list[str] | None, typer.Option(help="With --families: this model type alone; may be given several times.")
    ] = None,
    family_width: Annotated[int, typer.Option(min=1, help="Widths of the tests' tiny models, times this.")] = (
        Scale.width
    ),
    family_depth: Annotated[int, typer.Option(min=1, help="Their numbers of layers, times this.")] = Scale.depth,
    seed: Annotated[int, typer.Option(help="For weights and inputs.")] = 0,
    output: Annotated[Path | None, typer.Option(help="Write everything that was measured to this JSON file.")] = None,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a target or an equality is missed.")] = False,
) -> None:
    """Compare a model composed by anyvlm with transformers' own LLaVA class, on random weights that both share.

    Both are CLIP + mlp + llama. Checked: logits, loss, gradients and generated tokens are equal. Compared, as ratios
    anyvlm / LLaVA: the time of prefill, of a decoded token and of a training step, and the peak memory of a training
    step, each side in a process of its own.

    Times are those of this machine now. The ratios hold if nothing else runs; each comes with its spread.

    Examples:

    \b
      python benchmarks/parity.py --output parity.json
      python benchmarks/parity.py --only decoding --pairs 50
      python benchmarks/parity.py --only training --only memory --batch-size 8
      python benchmarks/parity.py --device cuda --dtype bfloat16 --hidden-size 2048 --num-layers 24
      python benchmarks/parity.py --families --pairs 10
    """
    console = Console()
    transformers.logging.set_verbosity_error()
    if hidden_size % 64:
        raise typer.BadParameter(
            f"{hidden_size} is not a multiple of 64, the width of a head.", param_hint="hidden-size"
        )
    if device.startswith("cuda") and not torch.cuda.is_available():
        raise typer.BadParameter("torch finds no CUDA device here; use --device cpu.", param_hint="device")
    only = only or list(Part)
    if quick and not threads:
        threads = 1  # a toy model gains nothing from more, and waits for them where the machine is shared
    if threads:
        torch.set_num_threads(threads)
    sizes = replace(
        DEFAULTS,
        hidden_size=hidden_size,
        num_layers=num_layers,
        num_heads=hidden_size // 64,
        image_size=image_size,
        batch_size=batch_size,
        answer_tokens=answer_tokens,
        tie_word_embeddings=not untied,
    )
    if quick:
        sizes, vocab_size, training_vocab_size, pairs, training_pairs = QUICK_SIZES, 512, 2048, 3, 3
    setting = Setting(torch.device(device), getattr(torch, Precision(dtype).value), seed, CLOCKS[Clock(clock).value])
    if family and not families:
        raise typer.BadParameter("goes with --families.", param_hint="family")
    if families:
        scale = QUICK_SCALE if quick else Scale(width=family_width, depth=family_depth)
        measured_in = environment(setting, Clock(clock).value)
        _compare_families(family, scale, setting, 3 if quick else pairs, measured_in, output, check)
        return
    report = {
        "environment": environment(setting, Clock(clock).value),
        "sizes": asdict(sizes) | {"image_tokens": sizes.image_tokens},
        "parameters": {
            f"vocabulary of {size:,}": parameter_counts(sizes, size) for size in (vocab_size, training_vocab_size)
        },
        "equality": [],
        "costs": [],
    }
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:

        def start(name: str, total: int):
            task = progress.add_task(name, total=total)
            return lambda: progress.advance(task)

        if Part.equality in only:
            tick = start("equality", 1)
            fp32_pair = build_pair(sizes, vocab_size, torch.float32, setting.device, seed)
            report["equality"] = [
                asdict(result) | {"passed": result.passed} for result in check_equality(*fp32_pair, sizes, seed)
            ]
            del fp32_pair
            tick()
        for part, name in ((Part.prefill, "prefill"), (Part.decoding, "decoding per token")):
            if part in only:
                tick = start(name, pairs + WARMUP_PAIRS)
                report["costs"].append(compare_inference(name, sizes, vocab_size, setting, pairs, tick))
        if Part.training in only:
            tick = start("training step", training_pairs + WARMUP_PAIRS)
            report["costs"] += compare_training(sizes, training_vocab_size, setting, training_pairs, tick)
        if Part.memory in only:
            tick = start("training peak memory", 1)
            report["costs"] += compare_memory(sizes, training_vocab_size, setting)
            tick()
    results = [line["passed"] for line in report["equality"] + report["costs"]]
    report["passed"] = False not in results
    show(report, console)
    if quick:
        console.print("[dim]The targets are meant for the default sizes; a toy model is all overhead.[/dim]")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {output}.")
    if check and not report["passed"]:
        raise typer.Exit(1)


def _compare_families(
    names: list[str] | None,
    scale: Scale,
    setting: Setting,
    pairs: int,
    environment: dict,
    output: Path | None,
    check: bool,
) -> None:
    console = Console()
    try:
        cases = family_cases(names)
    except ValueError as error:
        raise typer.BadParameter(str(error), param_hint="family") from error
    report = {"environment": environment, "scale": asdict(scale), "families": {}}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as progress:
        for name, case in cases.items():
            task = progress.add_task(name, total=len(COSTS) * (pairs + WARMUP_PAIRS))
            report["families"][name] = compare_family(
                case, scale, setting, pairs, lambda task=task: progress.advance(task)
            )
            gc.collect()
    report["passed"] = all(line["passed"] for lines in report["families"].values() for line in lines)
    for part in (environment, report["scale"]):
        console.print(", ".join(f"{name} [bold]{value}[/bold]" for name, value in part.items()))
    table = Table("anyvlm / native class", *COSTS, box=box.SIMPLE_HEAD)
    for name, lines in report["families"].items():
        table.add_row(name, *(f"{_with_quartiles(line)} {_verdict(line)}" for line in lines))
    console.print(table)
    console.print(
        f"Target: ≤ {TARGET}. ?: the 95 % interval of the median ratio holds it, so more pairs are needed to tell."
    )
    if scale == QUICK_SCALE:
        console.print("[dim]The target is meant for the default sizes; a toy model is all overhead.[/dim]")
    if output:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
        console.print(f"Written to {output}.")
    if check and not report["passed"]:
        raise typer.Exit(1)


def _with_quartiles(line: dict) -> str:
    quartiles = "" if "quartiles" not in line else " ({:.3f}-{:.3f})".format(*line["quartiles"])
    return f"{line.get('ratio', line.get('median')):.3f}{quartiles}"


def environment(setting: Setting, clock: str) -> dict:
    """What the numbers depend on beside the sizes."""
    device = setting.device
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.processor() or platform.machine()
    return {
        "anyvlm": anyvlm.__version__,
        "transformers": transformers.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "device": f"{device.type} ({name})",
        "threads": torch.get_num_threads(),
        "dtype": str(setting.dtype).removeprefix("torch."),
        "clock": clock,
        "optimizer": "AdamW (fused) on all parameters",
    }


def parameter_counts(sizes: Sizes, vocab_size: int) -> dict[str, int]:
    """Parameters of each part, and those of the vocabulary: embeddings, and the head if it has its own."""
    config = compose_ours(sizes, vocab_size, torch.float32, 0).config
    with torch.device("meta"):
        model = build_ours(config, torch.float32)
    counts = {name: sum(p.numel() for p in part.parameters()) for name, part in model.named_children()}
    vocabulary = {id(m.weight): m.weight for m in (model.get_input_embeddings(), model.get_output_embeddings())}
    return {**counts, "vocabulary": sum(weight.numel() for weight in vocabulary.values())}


def show(report: dict, console: Console) -> None:
    """Print the report as tables."""
    for key in ("environment", "sizes"):
        console.print(", ".join(f"{name} [bold]{value}[/bold]" for name, value in report[key].items()))
    for name, counts in report["parameters"].items():
        millions = ", ".join(f"{part} [bold]{count / 1e6:.1f} M[/bold]" for part, count in counts.items())
        console.print(f"parameters with a {name}: {millions}")
    if report["equality"]:
        table = Table("equality", "difference", "limit", "", box=box.SIMPLE_HEAD)
        for line in report["equality"]:
            table.add_row(line["name"], f"{line['value']:.3g}", f"{line['limit']:.3g}", _verdict(line))
        console.print(table)
    if report["costs"]:
        table = Table("cost", "anyvlm", "LLaVA", "ratio (quartiles)", "target", "", box=box.SIMPLE_HEAD)
        for line in report["costs"]:
            table.add_row(
                line["name"],
                _quantity(line["ours"], line["unit"]),
                _quantity(line["native"], line["unit"]),
                _with_quartiles(line),
                "" if line["target"] is None else f"≤ {line['target']}",
                _verdict(line),
            )
        console.print(table)
        console.print("?: the 95 % interval of the median ratio holds the target, so more pairs are needed to tell.")
        methods = {line["method"] for line in report["costs"] if "method" in line}
        for method in methods:
            console.print(f"Peak memory: {method}. Without the interpreter and its libraries unless said.")


def _quantity(value: float, unit: str) -> str:
    if unit == "s":
        return f"{value:.2f} s" if value >= 1 else f"{value * 1e3:.2f} ms"
    return f"{value / 2**20:,.1f} MiB" if unit == "B" else f"{value / 1e9:,.3g} GFLOP"


def _verdict(line: dict) -> str:
    """Passed or missed, with a question mark where the target lies within the interval of the median."""
    if line["passed"] is None:
        return ""
    low, high = line.get("interval") or (0.0, 0.0)
    noise = "?" if "interval" in line and low <= line["target"] <= high else ""
    return f"[green]passed{noise}[/green]" if line["passed"] else f"[red]missed{noise}[/red]"


if __name__ == "__main__":
    typer.run(main)
