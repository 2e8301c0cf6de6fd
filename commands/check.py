"""`anyvlm check`: whether two parts can be composed."""

import json
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cli_options import (
    DebugOption,
    Dtype,
    FurtherTowersOption,
    FusionOption,
    ImageAttentionOption,
    ImageSizeOption,
    ImageTextOption,
    ProjectorOption,
    TrustOption,
    ViewsOption,
    VisionFusion,
    VisionFusionOption,
    joining_arguments,
    towers_of,
)
from .running import calm_transformers, progress


_VERDICT_STYLES = {"yes": "bold green", "no": "bold red", "not known": "bold yellow"}


def check(
    vision: Annotated[
        str, typer.Argument(help="The vision tower: a Hub id, a folder, or a model type such as dinov2.")
    ],
    text: Annotated[
        str, typer.Argument(help="The language model: a Hub id, a folder, or a model type such as qwen3.")
    ],
    further_towers: FurtherTowersOption = None,
    vision_fusion: VisionFusionOption = VisionFusion.channel,
    projector: ProjectorOption = "mlp",
    fusion: FusionOption = "embed",
    image_attention: ImageAttentionOption = "causal",
    views: ViewsOption = None,
    image_text: ImageTextOption = None,
    image_size: ImageSizeOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of all weights; auto is the language model's own.")] = Dtype.auto,
    tokenizer: Annotated[
        str | None, typer.Option(help="Another tokenizer than the language model's: a Hub id or a folder.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print everything as JSON.")] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Say whether two parts can be composed, and what the model would be like, without downloading weights.

    Only configs are read (and tokenizer and image processor where there are some). The answer has the reason and the
    nearest that works if they cannot, tokens per picture, parameters and memory, what can be trained, and which class of
    transformers would hold the same pair. A model type stands for its default config.

    Exits with 0 if they can be composed, with 1 if not.

    Example: anyvlm check facebook/dinov2-small HuggingFaceTB/SmolLM2-135M-Instruct

    Example: anyvlm check dinov2 qwen3 --dtype bfloat16 --image-size 448

    Example: anyvlm check siglip qwen3 --projector pixel_shuffle --views tiles

    Example: anyvlm check siglip xlnet --json
    """
    arguments = joining_arguments(projector, fusion, image_attention, views, image_text, image_size, vision_fusion)
    towers = towers_of(vision, further_towers)
    calm_transformers()
    from anyvlm.composition.check import check as check_parts

    with progress.status(f"Checking {vision} and {text}…"):
        report = check_parts(
            towers,
            text,
            tokenizer=tokenizer,
            dtype=None if dtype is Dtype.auto else dtype.value,
            trust_remote_code=trust_remote_code,
            **arguments,
        )
    if as_json:
        typer.echo(json.dumps(report.to_dict(), indent=2))
    else:
        console = Console()
        if console.is_terminal:
            table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
            table.add_column(style="bold", no_wrap=True)
            table.add_column(overflow="fold")
            for name, value in report.lines():
                table.add_row(name, Text(value, style=_VERDICT_STYLES.get(value, "") if name == "works" else ""))
            console.print(table)
        else:
            typer.echo(str(report))
    raise typer.Exit(0 if report.works else 1)
