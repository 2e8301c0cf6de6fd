"""`anyvlm swap`: another tower or language model in a trained model."""

from enum import Enum
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

from ..cli_options import (
    DebugOption,
    Dtype,
    ImageSizeOption,
    TrustOption,
    ViewsOption,
    VisionFusion,
    VisionFusionOption,
    image_size_of,
    name_or_json,
    towers_of,
)
from .running import calm_transformers, load_composed, naming, progress


_STYLES = {
    "kept": "green",
    "replaced": "blue",
    "resized": "magenta",
    "solved": "cyan",
    "trained": "yellow",
    "initialised": "bold red",
}


class ImageTokens(str, Enum):
    """How many tokens a picture takes after a swap of the tower."""

    keep = "keep"
    own = "own"


def swap(
    source: Annotated[str, typer.Argument(metavar="SRC", help="A composed model: a folder or a Hub id.")],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder for the swapped checkpoint.")],
    vision: Annotated[
        list[str] | None, typer.Option(help="The new vision tower: a Hub id or a folder; repeat to fuse several.")
    ] = None,
    text: Annotated[str | None, typer.Option(help="The new language model: a Hub id or a folder.")] = None,
    images: Annotated[
        Path | None, typer.Option(help="A folder of pictures, without labels; a hundred do much.")
    ] = None,
    texts: Annotated[
        Path | None,
        typer.Option(help="A file of questions, one in a line, that the old language model answers for the new one."),
    ] = None,
    seconds: Annotated[
        float | None,
        typer.Option(min=0, help="Longest training without labels. Default: 60 for a tower, 90 for a language model."),
    ] = None,
    steps: Annotated[
        int | None, typer.Option(min=0, help="Most steps of it; alone, the same on a machine of any speed.")
    ] = None,
    num_pictures: Annotated[int | None, typer.Option(min=2, help="Look at so many pictures at most.")] = None,
    no_distillation: Annotated[
        bool, typer.Option("--no-distillation", help="No gradient step: the closed form alone.")
    ] = False,
    image_tokens: Annotated[
        ImageTokens, typer.Option(help="As many tokens of a picture as before, or as many as the new tower gives.")
    ] = ImageTokens.keep,
    projector: Annotated[
        str | None, typer.Option(help="Another projector, of which nothing is kept: a name, or JSON.")
    ] = None,
    image_size: ImageSizeOption = None,
    patch_size: Annotated[
        int | None, typer.Option(min=1, help="Pixels of a patch's edge, for the model's own tower.")
    ] = None,
    views: ViewsOption = None,
    vision_feature_layer: Annotated[
        str | None,
        typer.Option(
            metavar="NUMBER|last|best", help="Layer of the new tower that is read. Default: with pictures the best."
        ),
    ] = None,
    vision_fusion: VisionFusionOption = VisionFusion.channel,
    image_processor: Annotated[
        str | None, typer.Option(help="Another image processor than the new tower's: a Hub id or a folder.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="Another tokenizer than the new language model's: a Hub id or a folder.")
    ] = None,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of all weights; auto is the model's own.")] = Dtype.auto,
    seed: Annotated[int, typer.Option(help="For what is random.")] = 0,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Take the place of a checkpoint.")] = False,
    trust_remote_code: TrustOption = False,
    debug: DebugOption = False,
) -> None:
    """Put another vision tower or language model into a trained model, and keep most of what it knew.

    Without either, --image-size, --patch-size or --views make the model's own tower one for other pictures.

    What need not change stays bit for bit. With pictures, without labels, the projector is solved for and then trained for
    a short time to give what the old model gives. Beside the checkpoint stand a report of what was kept, solved and
    initialised (text, JSON, a picture), and a recipe of what to train next.

    The source is only read. The result takes its name when it is whole: stopped at any moment, nothing half is there. Only
    while it trains does Ctrl-C mean that it has trained enough.

    Example: anyvlm swap my-vlm --vision microsoft/resnet-50 --images photos --output my-swapped-vlm

    Example: anyvlm swap my-vlm --text HuggingFaceTB/SmolLM2-135M-Instruct --images photos --texts questions.txt -o swapped
    """
    if not vision and text is None and image_size is None and patch_size is None and views is None:
        raise typer.BadParameter("Nothing to swap: give --vision or --text, or --image-size for the same tower.")
    arguments = {
        "vision": towers_of(vision[0], vision[1:]) if vision else None,
        "text": text,
        "patch_size": patch_size,
        "vision_feature_layer": _layer(vision_feature_layer),
        "image_tokens": image_tokens.value,
        "projector": None if projector is None else name_or_json(projector),
        "image_size": image_size_of(image_size),
        "views": None if views is None else name_or_json(views),
        "vision_fusion": vision_fusion.value,
        "image_processor": image_processor,
        "tokenizer": tokenizer,
        "trust_remote_code": trust_remote_code,
        "seed": seed,
        **_learning(images, texts, 0 if no_distillation else seconds, steps, num_pictures),
    }
    read = [source, *(vision or []), text, images, texts, image_processor, tokenizer]
    _check_output(output, [str(path) for path in read if path is not None], overwrite)
    calm_transformers()
    from anyvlm.publishing.written_aside import written_aside
    from anyvlm.swapping.recipe import recipe_after
    from anyvlm.swapping.swap import swap as swap_part

    with written_aside(output) as partial:
        with progress.status(f"Loading {source}…"), naming(source):
            model, processor = load_composed(source, trust_remote_code, None if dtype is Dtype.auto else dtype.value)
        if images is not None and model.device.type == "cpu" and model.dtype.itemsize < 4:
            name = str(model.dtype).removeprefix("torch.")
            progress.print(
                f"The weights are {name}, which is slow on a CPU: --dtype float32 is faster.", style="yellow"
            )
        # No status here: what takes long shows bars of its own.
        new = " and ".join([*(vision or []), *([text] if text else [])]) or "the same tower for other pictures"
        progress.print(f"Swapping in {new}…", markup=False, highlight=False)
        with naming(*(vision or []), text, image_processor, tokenizer):
            model, processor, report = swap_part(model, processor, **arguments)
        report.recipe = recipe_after(report, model, checkpoint=str(output))
        report.next_steps = report.recipe["stages"]
        with progress.status(f"Saving to {output}…"):
            model.save_pretrained(partial)
            processor.save_pretrained(partial)
            names = [path.name for path in report.save(partial)]
    _print(report)
    typer.echo(f"Saved to {output}, with {', '.join(names)}")


def _layer(text: str | None) -> int | str | None:
    if text is None or text in ("last", "best"):
        return text
    try:
        return int(text)
    except ValueError as error:
        hint = "'--vision-feature-layer'"
        raise typer.BadParameter(f"{text!r} is no number of a layer, nor last or best.", param_hint=hint) from error


def _learning(
    images: Path | None, texts: Path | None, seconds: float | None, steps: int | None, num_pictures: int | None
) -> dict[str, Any]:
    """What to learn from, and for how long."""
    options = {"--texts": texts, "--seconds": seconds, "--steps": steps, "--num-pictures": num_pictures}
    given = [name for name, value in options.items() if value]
    if images is None:
        if given:
            raise typer.BadParameter(f"{', '.join(given)} say how to learn from pictures; give --images too.")
        return {}
    if not images.is_dir():
        raise typer.BadParameter(f"{images} is no folder.", param_hint="'--images'")
    learning = {"images": str(images), "seconds": seconds, "steps": steps, "num_pictures": num_pictures}
    if texts is not None:
        if not texts.is_file():
            raise typer.BadParameter(f"{texts} is no file.", param_hint="'--texts'")
        questions = [line.strip() for line in texts.read_text("utf-8").splitlines()]
        learning["texts"] = [question for question in questions if question]
        if not learning["texts"]:
            raise typer.BadParameter(f"{texts} has no line with words.", param_hint="'--texts'")
    return learning


def _check_output(output: Path, read: list[str], overwrite: bool) -> None:
    """Refuse what would destroy something, before anything is loaded."""
    hint = "'--output'"
    if output.exists() and not output.is_dir():
        raise typer.BadParameter(f"{output} is a file; choose a folder.", param_hint=hint)
    place = output.resolve()
    for path in read:
        if Path(path).exists() and Path(path).resolve().is_relative_to(place):
            raise typer.BadParameter(f"{output} holds {path}, which is read; choose another folder.", param_hint=hint)
    if output.is_dir() and any(output.iterdir()):
        if not overwrite:
            raise typer.BadParameter(f"{output} is not empty; choose another, or add --overwrite.", param_hint=hint)
        if not (output / "config.json").is_file():
            raise typer.BadParameter(
                f"{output} holds files that are no checkpoint, and is not overwritten; choose another.",
                param_hint=hint,
            )


def _print(report: Any) -> None:
    console = Console()
    if not console.is_terminal:
        typer.echo(str(report))
        return
    from anyvlm.composition.compatibility_report import count

    table = Table("part", "", "parameters", "")
    table.columns[2].justify = "right"
    for part in report.parts:
        state = Text(part["what"], style=_STYLES[part["what"]])
        table.add_row(part["name"], state, count(part["parameters"]), Text(part.get("note") or "", style="dim"))
    console.print(table)
    lines = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    lines.add_column(style="bold", no_wrap=True)
    lines.add_column(overflow="fold")
    for name, value in report.result_lines():
        lines.add_row(name, Text(value, style="yellow" if name == "warning" else ""))
    console.print(lines)
