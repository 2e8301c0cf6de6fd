"""`anyvlm verify`: what is wrong with a composed model, step by step."""

import json
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cli_options import DebugOption, Dtype, TrustOption
from .running import calm_transformers, naming, progress


_STYLES = {"passed": "green", "failed": "bold red", "not checked": "yellow", "not reached": "dim"}


def verify(
    checkpoint: Annotated[str, typer.Argument(help="A composed model: a folder or a Hub id.")],
    more: Annotated[
        list[str] | None, typer.Argument(metavar="[SOURCES]…", help="Further sources of --against.")
    ] = None,
    against: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCES…",
            help="What the model is made of: its tower, its language model, a model that holds either, a tokenizer, "
            "or the composed model before a swap. They are sorted by what they are; vision=…, text=…, tokenizer=…, "
            "image_processor=… and composed=… say it.",
        ),
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of pictures to look at. Default: patches of colour.")
    ] = None,
    trained: Annotated[
        str | None,
        typer.Option(
            metavar="PARTS",
            help="Parts that may differ from their sources, as they were trained: vision_tower, language_model, or "
            "both with a comma.",
        ),
    ] = None,
    all_steps: Annotated[bool, typer.Option("--all", help="Go on after the first failure.")] = False,
    no_fresh_process: Annotated[
        bool, typer.Option("--no-fresh-process", help="Leave out loading it in a process without anyvlm.")
    ] = False,
    scale_limit: Annotated[
        float, typer.Option(min=1, help="Largest factor between the size of image tokens and of text embeddings.")
    ] = 50.0,
    dtype: Annotated[Dtype, typer.Option(help="Dtype to load in; auto is the checkpoint's own.")] = Dtype.auto,
    device: Annotated[str | None, typer.Option(help="Where to run it, such as cuda. Default: the CPU.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Verify a composed model step by step, and name the first thing that is wrong. Start here when an answer is wrong.

    Files and loading; the language model alone, which must give its source's logits; the vision tower alone, its source's
    features; the projector, whose tokens must be like the text's embeddings; the processor: placeholders, chat template,
    ends of answers; and the whole: pictures change answers, batches and caches do not, and a fresh process loads it.

    Exits with 0 if nothing is wrong, with 1 if something is.

    Example: anyvlm verify my-vlm --against facebook/dinov2-small HuggingFaceTB/SmolLM2-135M-Instruct

    Example: anyvlm verify my-tuned-vlm --against facebook/dinov2-small my-lm --trained language_model

    Example: anyvlm verify swapped --against my-vlm microsoft/resnet-50 --all --json
    """
    calm_transformers()
    from anyvlm.swapping.verification import verify as verify_model

    sources = [*(against or []), *(more or [])]
    with progress.status(f"Verifying {checkpoint}…") as status, naming(checkpoint, *(_path(each) for each in sources)):
        report = verify_model(
            checkpoint,
            sources,
            images=images,
            trained=[part.strip() for part in trained.split(",")] if trained else (),
            all_steps=all_steps,
            fresh_process=not no_fresh_process,
            scale_limit=scale_limit,
            dtype=None if dtype is Dtype.auto else dtype.value,
            device=device,
            trust_remote_code=trust_remote_code,
            on_step=status.update,
        )
    console = Console()
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    elif console.is_terminal:
        table = Table("step", "check", "", "found", box=None, padding=(0, 2, 0, 0))
        for title, name, state, detail in report.lines():
            table.add_row(Text(title, style="bold"), name, Text(state, style=_STYLES[state]), Text(detail))
        console.print(table)
        for note in report.notes:
            console.print(Text(f"Note: {note}", style="yellow"))
        console.print(Text(report.verdict(), style="bold green" if report.passed else "bold red"))
    else:
        typer.echo(str(report))
    raise typer.Exit(0 if report.passed else 1)


def _path(source: str) -> str:
    """A source without what it was said to be."""
    prefix, separator, rest = source.partition("=")
    return rest if separator and not Path(source).exists() else source
