"""`anyvlm compose`: two parts into one checkpoint."""

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

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
from .running import calm_transformers, naming, progress


def compose(
    vision: Annotated[str, typer.Argument(help="The vision tower: a Hub id or a folder.")],
    text: Annotated[str, typer.Argument(help="The causal language model: a Hub id or a folder.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the composed checkpoint.")],
    further_towers: FurtherTowersOption = None,
    vision_fusion: VisionFusionOption = VisionFusion.channel,
    projector: ProjectorOption = "mlp",
    views: ViewsOption = None,
    image_text: ImageTextOption = None,
    fusion: FusionOption = "embed",
    image_attention: ImageAttentionOption = "causal",
    image_size: ImageSizeOption = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of all weights; auto is the language model's own.")] = Dtype.auto,
    tokenizer: Annotated[
        str | None, typer.Option(help="Another tokenizer than the language model's: a Hub id or a folder.")
    ] = None,
    seed: Annotated[int, typer.Option(help="For the new weights, those of the projector.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Write into a folder that holds files.")] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Join a vision tower and a language model, and save the model with its processor and its code.

    The parts keep their weights. The projector between them is new: the model has to be trained before it can see.

    Example: anyvlm compose facebook/dinov2-small HuggingFaceTB/SmolLM2-135M-Instruct --output my-vlm

    Example: anyvlm compose facebook/dinov2-small Qwen/Qwen3-0.6B --vision google/siglip-base-patch16-224 -o my-vlm
    """
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; choose a folder.", param_hint="'--output'")
    if output.is_dir() and any(output.iterdir()) and not overwrite:
        raise typer.BadParameter(
            f"{output} is not empty; choose another, or add --overwrite.", param_hint="'--output'"
        )
    arguments = joining_arguments(projector, fusion, image_attention, views, image_text, image_size, vision_fusion)
    towers = towers_of(vision, further_towers)
    calm_transformers()
    from anyvlm.composition.compose import compose as compose_model
    from anyvlm.demo.description import describe_parts

    named = " and ".join([vision, *(further_towers or []), text])
    with progress.status(f"Composing {named}…"), naming(vision, *(further_towers or []), text, tokenizer):
        model, processor = compose_model(
            towers,
            text,
            tokenizer=tokenizer,
            dtype=None if dtype is Dtype.auto else dtype.value,
            trust_remote_code=trust_remote_code,
            seed=seed,
            **arguments,
        )
    with progress.status(f"Saving to {output}…"):
        model.save_pretrained(output)
        processor.save_pretrained(output)

    description = describe_parts(model, processor)
    table = Table("part", "type")
    table.add_column("parameters", justify="right")
    for name, part in description["parts"].items():
        table.add_row(name, part["type"], f"{part['parameters']:,}")
    table.add_section()
    table.add_row("all", str(model.dtype).removeprefix("torch."), f"{model.num_parameters():,}")
    console = Console()
    console.print(table)
    height, width = description["picture_size"]
    others = "" if description["one_size"] else " Of another size or shape it takes more or fewer."
    tokens = description["tokens_per_picture"]
    count = "1 token" if tokens == 1 else f"{tokens} tokens"
    console.print(f"A picture of {height}x{width} pixels takes {count} in the text.{others}", highlight=False)
    typer.echo(f"Saved to {output}")
